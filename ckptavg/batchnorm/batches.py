"""Batches of any form: counted, joined, dealt out to processes, and brought to the device."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ckptavg.bn_options import BnOptions
from ckptavg.errors import BatchNormError, UsageError

_IN_FLIGHT = 2  # batches whose work may be queued on a GPU when the next one is copied
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of the loader.

    Attributes:
        value: As the loader gave it.
        on_device: Its tensors where the model is.
        n_samples: How many samples; None if they cannot be counted.
    """

    value: Any
    on_device: Any
    n_samples: int | None


def refuse_used_up(what: str, batches: object, n_passes: int) -> None:
    """Refuse batches that can be gone through only once, where several passes need them.

    Args:
        what: What messages call them.
        batches: The batches, or what returns them.
        n_passes: How often they are gone through.

    Raises:
        UsageError: If so.
    """
    if n_passes > 1 and isinstance(batches, Iterator):
        raise UsageError(
            f"{what} is a {type(batches).__name__}, which can be gone through only once, and there "
            f"are {n_passes} passes to make: give a function that returns it"
        )


class Feed:
    """Goes through a loader's batches, those of one process, and brings them to the device.

    On a GPU the next batch is copied on a stream of its own while the last one is worked on.

    Attributes:
        n_batches, n_samples: Of this process so far.
        wait_seconds: How long the loader took.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        device: torch.device,
        options: BnOptions,
        *,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        """Prepare; nothing is asked of the loader yet."""
        self._batches = batches
        self._device = device
        self._options = options
        is_own = options.data_per_process or size == 1 or _is_shared_out(batches, size)
        self._rank, self._size = (0, 1) if is_own else (rank, size)
        self.n_batches = self.n_samples = 0
        self.wait_seconds = 0.0
        self._copies = _CopyStream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[Batch]:
        for value, n_samples in self._limited():
            self.n_batches += 1
            self.n_samples += n_samples or 0
            yield Batch(value, self.placed(value), n_samples)

    def placed(self, value: Any) -> Any:
        """Bring one batch to the device."""
        if self._copies is not None:
            return self._copies.run(value, self._placed)
        return self._placed(value)

    def copy_seconds(self) -> float:
        """Return how long a GPU took to copy the batches; waits for it."""
        return 0.0 if self._copies is None else self._copies.seconds()

    def _limited(self) -> Iterator[tuple[Any, int | None]]:
        """Yield this process's batches, up to the limits, which count those of all."""
        options, seen, index = self._options, 0, 0
        started = perf_counter()
        iterator = iter(self._batches)  # may start workers
        self.wait_seconds += perf_counter() - started
        while options.max_batches is None or index < options.max_batches:
            started = perf_counter()
            try:
                value = next(iterator)
            except StopIteration:
                return
            finally:
                self.wait_seconds += perf_counter() - started
            n_samples = batch_size(value)
            if options.max_samples is not None and n_samples is None:
                raise BatchNormError(
                    f"a batch is a {type(value).__name__}, whose samples cannot be counted; "
                    "use max_batches (--batches) instead of max_samples (--samples)"
                )
            if index % self._size == self._rank:
                yield value, n_samples
            index += 1
            seen += n_samples or 0
            if options.max_samples is not None and seen >= options.max_samples:
                return

    def _placed(self, value: Any) -> Any:
        moved = to_device(value, self._device)
        return channels_last(moved) if self._options.channels_last else moved


class _CopyStream:
    """Copies batches on a stream of their own, never more than a few ahead of the work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types
        self._worked: deque[torch.cuda.Event] = deque()
        self._spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0  # of those that are over

    def run(self, value: Any, place: Callable[[Any], Any]) -> Any:
        """Start a copy; what is queued on the current stream from now on waits for it."""
        working = torch.cuda.current_stream(self._device)
        if not _is_of_tensors(value):  # whose memory this stream would not know to be in use
            return place(value)
        self._worked.append(_recorded(working))
        if len(self._worked) > _IN_FLIGHT:
            self._worked.popleft().synchronize()
        if any(tensor.is_cuda for tensor in tensors_of(value)):  # perhaps still being made
            self._stream.wait_stream(working)
        with torch.cuda.stream(self._stream):
            started = _recorded(self._stream)
            moved = place(value)
            self._spans.append((started, _recorded(self._stream)))
            while len(self._spans) > 2 * _IN_FLIGHT:
                self._seconds += _elapsed(*self._spans.popleft())
        working.wait_stream(self._stream)
        for tensor in tensors_of(moved):
            if tensor.is_cuda:
                tensor.record_stream(working)
        return moved

    def seconds(self) -> float:
        """Return how long all copies took."""
        self._stream.synchronize()
        return self._seconds + sum(_elapsed(*span) for span in self._spans)


def _elapsed(started: torch.cuda.Event, ended: torch.cuda.Event) -> float:
    return float(started.elapsed_time(ended)) / 1000


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # likewise
    event.record(stream)
    return event


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor in nested tuples, lists and mappings to a device; types stay."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, PackedSequence):
        return batch.to(device=device)  # type: ignore[call-arg]  # torch's types are wrong
    return _mapped(batch, lambda item: to_device(item, device), other=_moved_by_itself(device))


def channels_last(batch: Any) -> Any:
    """Lay images and volumes in a batch out with channels last."""
    if isinstance(batch, Tensor):
        layout = CHANNELS_LAST.get(batch.dim())
        return batch if layout is None else batch.to(memory_format=layout)
    return _mapped(batch, channels_last, other=lambda item: item)


def batch_size(batch: Any) -> int | None:
    """Return the length of the first tensor in a batch that has one; None if none has."""
    return next((len(tensor) for tensor in tensors_of(batch) if tensor.dim()), None)


def joined(first: Any, second: Any) -> Any:
    """Join two batches of the same form, sample after sample.

    Raises:
        ValueError: If they do not fit together.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.numel() and first.data_ptr() == second.data_ptr():
            raise ValueError("the loader uses the memory of one batch for the next")
        if not first.dim() and not second.dim() and torch.equal(first, second):
            return first
        if not first.dim() or first.shape[1:] != second.shape[1:]:
            raise ValueError("tensors of other shapes")
        if first.dtype != second.dtype:
            raise ValueError("tensors of other dtypes")
        return torch.cat([first, second.to(first.device)])
    if type(first) is not type(second):
        raise ValueError("other types")
    if isinstance(first, Mapping):
        if first.keys() != second.keys():
            raise ValueError("other keys")
        pairs = {key: joined(value, second[key]) for key, value in first.items()}
        return _mapped_items(first, pairs)
    if isinstance(first, (tuple, list)):
        holds_parts = any(
            isinstance(item, (Tensor, Mapping, tuple, list)) for item in (*first, *second)
        )
        if holds_parts or hasattr(first, "_fields"):
            if len(first) != len(second):
                raise ValueError("other lengths")
            items = [joined(one, other) for one, other in zip(first, second, strict=True)]
            return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
        return type(first)([*first, *second])  # one entry a sample
    if first is second or first == second:
        return first
    raise ValueError("values that are no tensors")


def _is_shared_out(batches: Iterable[Any], size: int) -> bool:
    """Tell whether a loader gives each process a share of its own already."""
    from torch.utils.data.distributed import DistributedSampler

    sampler = getattr(batches, "sampler", None)
    inner = getattr(getattr(batches, "batch_sampler", None), "sampler", None)
    return any(
        isinstance(one, DistributedSampler) and one.num_replicas == size for one in (sampler, inner)
    )


def _mapped(batch: Any, change: Callable[[Any], Any], other: Callable[[Any], Any]) -> Any:
    """Change what nested tuples, lists and mappings hold; types stay."""
    if isinstance(batch, Mapping):
        return _mapped_items(batch, {key: change(value) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(change(item) for item in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(change(item) for item in batch)
    return other(batch)


def _mapped_items(batch: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    if not isinstance(batch, MutableMapping):
        return items
    mapped = copy.copy(batch)  # transformers' BatchEncoding.to would change the user's own
    for key, value in items.items():
        mapped[key] = value
    return mapped


def _moved_by_itself(device: torch.device) -> Callable[[Any], Any]:
    def move(batch: Any) -> Any:
        if hasattr(batch, "to") and callable(batch.to):  # PyTorch Geometric's Data and the like
            return batch.to(device)
        return batch

    return move


def _is_of_tensors(batch: Any) -> bool:
    """Tell whether a batch holds nothing whose inside is unknown."""
    if isinstance(batch, Mapping):
        return all(map(_is_of_tensors, batch.values()))
    if isinstance(batch, (tuple, list)):
        return all(map(_is_of_tensors, batch))
    return isinstance(batch, Tensor) or not hasattr(batch, "to")


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested tuples, lists and mappings."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from tensors_of(item)
    elif isinstance(batch, (tuple, list)):
        for item in batch:
            yield from tensors_of(item)
