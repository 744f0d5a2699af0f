"""Reading ahead over several connections, in bounded memory, and hashing what comes in order.

Files are read in segments. Whoever reads in one causes the next ones of that file to be fetched, as
far as memory goes. A segment is let go once all of it was read and hashed; one that was read in
part goes when its memory is needed.
"""

from collections import deque
from threading import Condition, Event, Thread
from time import monotonic, thread_time

from ckptavg.errors import HubError
from ckptavg.hub.remote_file import HubFile
from ckptavg.hub.threads import start

CONNECTIONS = 8
_MAX_SEGMENT_BYTES = 8 * 2**20
_MIN_SEGMENT_BYTES = 64 * 1024
_MAX_AHEAD = 8
_OLD_ROUNDS = 4  # a segment that is still being read is used more often
_POLL_SECONDS = 0.2
_FIRST_CONNECTIONS = 2
_TRIAL_SECONDS = 0.1  # of fetching, after which it is clear whether it waits for the network


class _Segment:
    """Part of a file: wanted, then there (or failed), then read."""

    def __init__(self, file: HubFile, number: int, start: int, nbytes: int) -> None:
        self.file = file
        self.key = file, number
        self.start = start
        self.nbytes = nbytes
        self.buffer: bytearray | None = None
        self.is_there = False
        self.is_hashed = start + nbytes <= file.n_hashed_bytes
        self.error: BaseException | None = None
        self.n_users = 0
        self.n_read_bytes = file.n_seen_bytes(start, nbytes)  # headers will not be read again
        self.is_read_to_its_end = False
        self.last_use = 0

    @property
    def content(self) -> memoryview:
        assert self.buffer is not None
        return memoryview(self.buffer)[: self.nbytes]


class ReadAhead:
    """Fetches segments of many files, those first that somebody waits for."""

    def __init__(self, connections: int = CONNECTIONS) -> None:
        """Begin without threads; they come with the first segment.

        Args:
            connections: Requests that may be under way at once.
        """
        self.cancelled = Event()
        self.connections = connections
        self._changed = Condition()
        self._segments: dict[tuple[HubFile, int], _Segment] = {}  # those used last are last
        self._queue: deque[_Segment] = deque()
        self._free: list[bytearray] = []
        self._threads: list[Thread] = []
        self._n_allowed = min(_FIRST_CONNECTIONS, connections)
        self._n_uses = 0
        self._trial_seconds = self._trial_cpu_seconds = 0.0
        self._segment_bytes, self._n_ahead, self._max_segments = _MIN_SEGMENT_BYTES, 1, 16

    def fit(self, max_bytes: int, n_files: int, largest_bytes: int) -> int:
        """Choose how much is fetched at once and ahead; before any data is read.

        Args:
            max_bytes: Bound for what is held.
            n_files: Files that are read side by side.
            largest_bytes: Size of the largest of them.

        Returns:
            Bytes that will be held at most.
        """
        n_files = max(n_files, 1)
        nbytes = max_bytes // (2 * n_files)
        self._segment_bytes = max(_MIN_SEGMENT_BYTES, min(nbytes, _MAX_SEGMENT_BYTES))
        self._segment_bytes = min(self._segment_bytes, largest_bytes)
        self._segment_bytes += -self._segment_bytes % 4096
        by_memory = max_bytes // (self._segment_bytes * n_files) - 1
        self._n_ahead = max(1, min(by_memory, _MAX_AHEAD))
        self._max_segments = max(2, (1 + self._n_ahead) * n_files)
        return self._max_segments * self._segment_bytes

    def read_into(self, file: HubFile, offset: int, buffer: memoryview) -> None:
        """Fill a buffer; raises what fetching raised."""
        filled = 0
        while filled < len(buffer):
            segment = self._take(file, (offset + filled) // self._segment_bytes)
            first = offset + filled - segment.start
            count = min(segment.nbytes - first, len(buffer) - filled)
            buffer[filled : filled + count] = segment.content[first : first + count]
            filled += count
            self._give_back(segment, count, first + count == segment.nbytes)

    def finish(self, file: HubFile) -> None:
        """Read what is left to hash of a file."""
        while file.n_hashed_bytes < file.size:
            segment = self._take(file, file.n_hashed_bytes // self._segment_bytes)
            self._hash_in_order(file)  # what is there, and was not the next one when it came
            self._give_back(segment, segment.nbytes, True)

    def forget(self, file: HubFile) -> None:
        """Let go of all segments of a file."""
        with self._changed:
            for segment in [one for one in self._segments.values() if one.file is file]:
                if segment in self._queue:
                    self._queue.remove(segment)
                    self._drop(segment)
                elif segment.n_users == 0 and (segment.is_there or segment.error):
                    self._drop(segment)

    def cancel(self) -> None:
        """Make everything that waits or fetches fail soon."""
        self.cancelled.set()
        with self._changed:
            self._changed.notify_all()

    def _take(self, file: HubFile, number: int) -> _Segment:
        """Return a segment once it is there, and have the next ones fetched."""
        with self._changed:
            segment = self._wanted(file, number)
            segment.n_users += 1
            self._n_uses += 1
            segment.last_use = self._n_uses
            for ahead in range(number + 1, number + 1 + self._n_ahead):
                if ahead * self._segment_bytes >= file.size:
                    break
                if (file, ahead) not in self._segments and not self._has_room(_OLD_ROUNDS):
                    break
                self._ahead(file, ahead)
            while not (segment.is_there or segment.error):
                if self.cancelled.is_set():
                    raise HubError(f"{file.label}: cancelled")
                self._changed.wait(_POLL_SECONDS)
            if segment.error is not None:
                segment.n_users -= 1
                if not segment.n_users:
                    self._drop(segment)
                raise segment.error
            return segment

    def _wanted(self, file: HubFile, number: int) -> _Segment:
        """Return a segment that somebody waits for: it goes before all that is read ahead."""
        segment = self._segments.pop((file, number), None)
        if segment is None:
            self._has_room(0)  # or take the memory all the same: nobody may wait for ever
            segment = self._new(file, number)
            self._queue.appendleft(segment)
            self._start_thread()
            self._changed.notify_all()
        elif segment in self._queue:
            self._queue.remove(segment)
            self._queue.appendleft(segment)
        self._segments[segment.key] = segment
        return segment

    def _ahead(self, file: HubFile, number: int) -> None:
        if (file, number) in self._segments:
            return
        segment = self._new(file, number)
        self._segments[segment.key] = segment
        self._queue.append(segment)
        self._start_thread()
        self._changed.notify_all()

    def _new(self, file: HubFile, number: int) -> _Segment:
        start = number * self._segment_bytes
        return _Segment(file, number, start, min(self._segment_bytes, file.size - start))

    def _has_room(self, n_rounds: int) -> bool:
        """Tell whether there is memory for one more; drop what was read in part if need be.

        Args:
            n_rounds: How often all others must have been used since, for a segment to be dropped.
        """
        if len(self._segments) < self._max_segments:
            return True
        before = self._n_uses - n_rounds * self._max_segments
        idle = [
            segment
            for segment in self._segments.values()
            if 0 < segment.last_use <= before and segment.is_there and not segment.n_users
        ]
        if idle:  # the oldest; one that is not hashed would have to be fetched again
            self._drop(next((segment for segment in idle if segment.is_hashed), idle[0]))
        return bool(idle)

    def _give_back(self, segment: _Segment, n_read_bytes: int, is_end: bool) -> None:
        with self._changed:
            segment.is_read_to_its_end |= is_end
            segment.n_users -= 1
            segment.n_read_bytes += n_read_bytes
            self._drop_if_done(segment)

    def _drop_if_done(self, segment: _Segment) -> None:
        is_read = segment.is_read_to_its_end and segment.n_read_bytes >= segment.nbytes
        if is_read and segment.is_hashed and not segment.n_users:
            self._drop(segment)

    def _drop(self, segment: _Segment) -> None:
        self._segments.pop(segment.key, None)
        if segment.buffer is not None and len(self._segments) + len(self._free) < (
            self._max_segments
        ):
            self._free.append(segment.buffer)
        segment.buffer = None

    def _start_thread(self) -> None:
        if len(self._threads) < min(self._n_allowed, len(self._queue) + 1):
            thread = Thread(target=self._fetch, daemon=True)
            start(thread)
            self._threads.append(thread)

    def _fetch(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    if self.cancelled.is_set():
                        return
                    self._changed.wait(_POLL_SECONDS)
                segment = self._queue.popleft()
                free = self._free.pop() if self._free else None
            began, cpu_began = monotonic(), thread_time()
            try:
                segment.buffer = free if free is not None else bytearray(self._segment_bytes)
                segment.file.fetch(segment.start, segment.content, self.cancelled)
                segment.file.check_seen(segment.start, segment.content)
                segment.file.check_same(segment.start, segment.content)
            except BaseException as error:
                with self._changed:
                    segment.error = error
                    if not segment.n_users:
                        self._drop(segment)  # whoever wants it will try anew
                    self._changed.notify_all()
                continue
            with self._changed:
                segment.is_there = True
                self._try(monotonic() - began, thread_time() - cpu_began)
                self._changed.notify_all()
            self._hash_in_order(segment.file)

    def _try(self, seconds: float, cpu_seconds: float) -> None:
        """Allow one more connection if those there are mostly wait for the network.

        Where they do not, as with a Hub in the same building, more of them only get into each
        other's way.
        """
        self._trial_seconds += seconds
        self._trial_cpu_seconds += cpu_seconds
        if self._trial_seconds < _TRIAL_SECONDS:
            return
        if self._trial_cpu_seconds < self._trial_seconds / 5:
            self._n_allowed = min(self._n_allowed + 1, self.connections)
            if self._queue:
                self._start_thread()
        self._trial_seconds = self._trial_cpu_seconds = 0.0

    def _hash_in_order(self, file: HubFile) -> None:
        """Hash the segments that follow what is hashed, as far as they are there."""
        with file.hash_lock:
            while file.n_hashed_bytes < file.size:
                number = file.n_hashed_bytes // self._segment_bytes
                with self._changed:
                    segment = self._segments.get((file, number))
                    if segment is None or not segment.is_there:
                        return
                    segment.n_users += 1
                file.add_to_hash(segment.content)
                with self._changed:
                    segment.n_users -= 1
                    segment.is_hashed = True
                    self._drop_if_done(segment)
                    self._changed.notify_all()
