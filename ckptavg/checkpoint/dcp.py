"""torch.distributed.checkpoint (DCP) directories: what FSDP, torchtitan and Megatron write.

``.metadata`` says, for every tensor, which rectangular parts of it are where in the ``.distcp``
files; each part is a small torch file of its own.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from ckptavg.checkpoint.dcp_metadata import METADATA_NAME, DcpMetadata, StoredPart, part_key
from ckptavg.checkpoint.dcp_safetensors import part_offsets
from ckptavg.checkpoint.files import ReadableFile
from ckptavg.checkpoint.folder import Folder
from ckptavg.checkpoint.limits import MAX_DCP_METADATA_BYTES
from ckptavg.checkpoint.pickle_values import Pairs, Storage, TensorView
from ckptavg.checkpoint.safetensors import SafetensorsHeader, read_header
from ckptavg.checkpoint.sharded import AnyPlace, Part, Place, assembled, check_cover
from ckptavg.checkpoint.state_dict import (
    EPOCH_KEYS,
    STEP_KEYS,
    WEIGHT_KEYS,
    find_state_dict,
    is_average,
    is_training_state,
    some,
)
from ckptavg.checkpoint.stored import StoredCheckpoint
from ckptavg.checkpoint.strided import row_major_strides
from ckptavg.checkpoint.torch_file import add_training_facts, place_view
from ckptavg.checkpoint.torch_zip import TorchZip
from ckptavg.errors import CheckpointError, IncompleteCheckpointError
from ckptavg.tensors import TensorInfo

_MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"})
_STATES = ("train_state", "trainer_state", "training_state", "state", "progress")
_FACTS_NAMES = ("meta.pt", "common.pt")
_MAX_FACTS_BYTES = 64 * 2**20
LAYOUT = "torch.distributed.checkpoint directory"
_MAX_SIZE = 2**63
_MAX_STATE_BYTES = 64 * 2**10  # a step; what is longer is something else
_EDGE_BYTES = 1024  # headers at both ends of the torch file that a part is


class _Range:
    """A range of a file, read as a file of its own: a ``ReadableFile`` for headers."""

    def __init__(self, file: ReadableFile, stored: StoredPart) -> None:
        """Look at a range.

        Raises:
            CheckpointError: If it reaches past the end of the file.
        """
        self.file, self.offset, self.size = file, stored.offset, stored.nbytes
        self.path, self.label, self.stamp = file.path, file.label, file.stamp
        if stored.offset + stored.nbytes > file.size:
            raise IncompleteCheckpointError(
                f"{file.label}: has {file.size} bytes, but {METADATA_NAME} describes "
                f"{stored.offset + stored.nbytes}: it is truncated"
            )

    def read(self, offset: int, nbytes: int) -> bytes:
        if offset < 0 or offset + nbytes > self.size:
            raise CheckpointError(
                f"{self.label}: what {METADATA_NAME} describes at byte {self.offset} is no whole "
                "torch file"
            )
        return self.file.read(self.offset + offset, nbytes)

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Nothing: the edges of all ranges were asked for at once."""

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.file.read_into(self.offset + offset, buffers)

    def check_unchanged(self) -> None:
        self.file.check_unchanged()

    def verify(self) -> None:
        self.file.verify()

    def close(self) -> None:
        self.file.close()


class _Files:
    """The ``.distcp`` files of a directory, each opened once it is needed."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self.opened: dict[str, ReadableFile] = {}
        self._taken: set[tuple[str, int]] = set()
        self._headers: dict[str, tuple[SafetensorsHeader, dict[str, tuple[int, ...]]] | None] = {}

    def open(self, stored: StoredPart) -> _Range:
        name = stored.file_name
        if name not in self.opened:
            label = f"{self._folder.label}/{name}"
            if not self._folder.has(name):
                raise IncompleteCheckpointError(
                    f"{label}: is missing; {METADATA_NAME} says it is there"
                )
            self.opened[name] = self._folder.open(name, label)
        return _Range(self.opened[name], stored)

    def check_whole(self, stored: Iterable[StoredPart]) -> None:
        """See that the opened files hold all that is said to be in them, also what is not read.

        Raises:
            CheckpointError: If one is too short.
        """
        for part in stored:
            if part.file_name in self.opened:
                _Range(self.opened[part.file_name], part)

    def prefetch(self, wanted: Iterable[StoredPart]) -> None:
        """Have the headers of many parts read at once."""
        ranges: dict[str, list[tuple[int, int]]] = {}
        for one in wanted:
            edge = min(_EDGE_BYTES, one.nbytes)
            ranges.setdefault(one.file_name, []).extend(
                ((one.offset, edge), (one.offset + one.nbytes - edge, edge))
            )
        for name, edges in ranges.items():
            self.opened[name].prefetch(edges)

    def place(
        self, stored: StoredPart, name: str, first: tuple[int, ...], info: TensorInfo
    ) -> Place:
        """Read the headers of a part, and return where its elements are in its file."""
        found = self.open(stored)
        parts = self._safetensors_parts(stored)
        known, place = None, Place(found.file, 0)
        if parts is not None:
            header, offsets = parts
            # one name has one part in a file, even where the process held several
            known = header.tensors.get(name) if offsets.get(name) == first else None
            place = Place(found.file, header.offsets.get(name, 0))
        else:
            where = stored.file_name, stored.offset
            if where in self._taken:
                raise CheckpointError(
                    f"{self._folder.label}: tensor '{name}' has a part in the same place as "
                    f"another one, byte {stored.offset} of {stored.file_name}"
                )
            self._taken.add(where)
            archive = TorchZip(found)
            view = archive.root
            if type(view) is TensorView:
                known = TensorInfo(view.dtype, view.shape)
                place = place_view(found, archive, name, view)
                place = place._replace(file=found.file, offset=found.offset + place.offset)
        if known != info:
            raise CheckpointError(
                f"{found.label}: holds something else at byte {found.offset} than the part of "
                f"tensor '{name}' of {info.dtype} and shape {list(info.shape)} that "
                f"{METADATA_NAME} describes"
            )
        return place

    def _safetensors_parts(
        self, stored: StoredPart
    ) -> tuple[SafetensorsHeader, dict[str, tuple[int, ...]]] | None:
        """Return the header of a file in the safetensors format, and where its parts begin.

        ``FileSystemWriter(serialization_format=SerializationFormat.SAFETENSORS)`` writes them.
        """
        name, file = stored.file_name, self.opened[stored.file_name]
        if name not in self._headers:
            head = file.read(0, min(file.size, 9))
            self._headers[name] = None
            if head[8:] == b"{":
                header = read_header(file)
                self._headers[name] = header, part_offsets(header, file.label)
        return self._headers[name]

    def close(self) -> None:
        for file in self.opened.values():
            file.close()


def open_dcp(folder: Folder, *, state_key: str | None) -> StoredCheckpoint:
    """Open a torch.distributed.checkpoint directory.

    Tensors that were sharded over processes, along any dimensions and unevenly, are whole tensors
    here; optimizer state is never read.

    Args:
        folder: The directory with ``.metadata``.
        state_key: Which entry holds the weights, as for torch files.

    Raises:
        CheckpointError: If it is damaged or hostile, files are missing, or nothing in it can be
            told to be the weights.
    """
    label = f"{folder.label}/{METADATA_NAME}"
    file = folder.open(METADATA_NAME, label)
    files = _Files(folder)
    files.opened[METADATA_NAME] = file
    try:
        if file.size > MAX_DCP_METADATA_BYTES:
            raise CheckpointError(
                f"{label}: has {file.size} bytes, at most {MAX_DCP_METADATA_BYTES} are allowed"
            )
        metadata = DcpMetadata(file.read(0, file.size), label)
        root = _nested(metadata, label)
        state_dict, notes = find_state_dict(root, state_key, folder.label)
        names = {}
        left_out = []
        for name, value in state_dict.items:
            if type(value) is TensorView:
                names[name] = value.storage.key  # its name in the metadata
            else:
                left_out.append(name)
        if left_out:
            notes.append(f"left out, not tensors: {some(left_out)}")
        moments = [name for name in names if not _MOMENTS.isdisjoint(name.split("."))]
        if moments:
            raise CheckpointError(
                f"{folder.label}: '{moments[0]}' is optimizer state, and nothing tells it from the "
                'weights; save the model in a mapping of its own, such as {"model": ...}'
            )
        tensors, places = _placed(metadata, names, files, folder.label)
        step = _state_number(metadata, files, STEP_KEYS)
        epoch = _state_number(metadata, files, EPOCH_KEYS)
        files.check_whole(metadata.stored.values())
    except BaseException:
        files.close()
        raise
    checkpoint = StoredCheckpoint(
        label=folder.label,
        layout=LAYOUT,
        tensors=tensors,
        places=places,
        open_files=list(files.opened.values()),
        step=step,
        epoch=epoch,
        notes=notes,
    )
    try:
        _add_facts_beside(checkpoint, folder)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _add_facts_beside(checkpoint: StoredCheckpoint, folder: Folder) -> None:
    """Read what Lightning and Megatron save once, in a torch file beside the parts."""
    for name in _FACTS_NAMES:
        if folder.has(name) and 0 < folder.size(name) <= _MAX_FACTS_BYTES:
            with suppress(CheckpointError):  # it is not needed, and Megatron's may name its code
                file = folder.open(name, f"{folder.label}/{name}")
                try:
                    file.verify()
                    add_training_facts(checkpoint, file, TorchZip(file))
                finally:
                    file.close()


def _placed(
    metadata: DcpMetadata, names: dict[str, str], files: _Files, label: str
) -> tuple[dict[str, TensorInfo], dict[str, AnyPlace]]:
    """Find the parts of every tensor; ``names`` are the model's -> the metadata's."""
    wanted = []
    for name, saved_name in names.items():
        saved = metadata.saved[saved_name]
        if saved.dtype is not None:  # before any part is looked at: there may be many
            whole = TensorInfo(saved.dtype, saved.shape)
            cover = [(first, shape) for first, shape in saved.parts if 0 not in shape]
            if cover or whole.numel:
                check_cover(whole, cover, f"{label}: tensor '{name}'")
        for first, shape in saved.parts:
            if 0 in shape:
                continue
            stored = metadata.stored.get(part_key(saved_name, first))
            if stored is None:
                raise CheckpointError(f"{label}: a part of tensor '{name}' is stored nowhere")
            wanted.append(stored)
            files.open(stored)
    files.prefetch(wanted)
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, AnyPlace] = {}
    for name, saved_name in names.items():
        saved = metadata.saved[saved_name]
        if saved.dtype is None:
            raise AssertionError("only tensors have names here")
        info = TensorInfo(saved.dtype, saved.shape)
        parts = []
        for first, shape in saved.parts:
            if 0 not in shape:
                stored = metadata.stored[part_key(saved_name, first)]
                place = files.place(stored, saved_name, first, TensorInfo(saved.dtype, shape))
                parts.append(Part(first, shape, place))
        what = f"{label}: tensor '{name}'"
        if info.numel or parts:
            places[name] = assembled(info, parts, what)
        else:
            places[name] = Place(files.opened[METADATA_NAME], 0)
        tensors[name] = info
    return tensors, places


def _nested(metadata: DcpMetadata, label: str) -> Pairs:
    """Return what was saved as mappings in mappings, as the pickle of a torch file gives it.

    The path to every entry is what the planner noted (``planner_data``); where it did not, the
    first part of a name counts if all weights have it. Names at the top whose first part sets
    training state apart, such as ``optimizer.``, are put into a mapping of that name.

    Raises:
        CheckpointError: If a tensor takes the place of something else.
    """
    paths = metadata.paths
    if not paths:
        heads = {
            name.partition(".")[0]
            for name in metadata.saved
            if not is_training_state(name.partition(".")[0])
        }
        whole = len(heads) == 1 and heads <= set(WEIGHT_KEYS)
        for name in metadata.saved:
            head, _, rest = name.partition(".")
            paths[name] = (head, rest) if rest and whole else (name,)
    rests: dict[str, set[str]] = {}  # first part of names at the top -> what follows it
    for path in paths.values():
        head, _, rest = path[0].partition(".")
        rests.setdefault(head if len(path) == 1 and rest else "", set()).add(rest or path[0])
    apart = {  # Megatron's optimizer, somebody's ema.
        head
        for head in rests
        if is_training_state(head)
        or (is_average(head) and rests[head] <= _others(rests, head) | paths.keys())
    }
    for name, path in list(paths.items()):
        head, _, rest = path[0].partition(".")
        if len(path) == 1 and rest and head in apart:
            paths[name] = (head, rest)
    root = Pairs()
    taken: dict[tuple[int, str], Any] = {}  # mapping and key -> what is there

    def put(mapping: Pairs, path: tuple[str, ...], key: str, value: Any) -> None:
        if type(taken.get((id(mapping), key))) is TensorView or (
            type(value) is TensorView and (id(mapping), key) in taken
        ):
            raise CheckpointError(
                f"{label}: is damaged: '{'.'.join(path)}' is not the only entry in its place"
            )
        taken[id(mapping), key] = value
        mapping.items.append((key, value))

    for name, saved in metadata.saved.items():
        path = paths.get(name, (name,))
        mapping = root
        for key in path[:-1]:
            inner = taken.get((id(mapping), key))
            if type(inner) is not Pairs:
                inner = Pairs()
                put(mapping, path, key, inner)
            mapping = inner
        value: Any = None
        if saved.dtype is not None:
            numel = TensorInfo(saved.dtype, saved.shape).numel
            storage = Storage(name, saved.dtype, numel)
            value = TensorView(storage, saved.dtype, 0, saved.shape, row_major_strides(saved.shape))
        if value is not None or (id(mapping), path[-1]) not in taken:
            put(mapping, path, path[-1], value)
    return root


def _others(rests: dict[str, set[str]], head: str) -> set[str]:
    return set().union(*(rests[one] for one in rests if one != head))


def _state_number(metadata: DcpMetadata, files: _Files, keys: Sequence[str]) -> int | None:
    """Return the first number of some that the training state holds: its step, or its epoch."""
    by_key: dict[str, str] = {}
    for name in metadata.saved:
        path = metadata.paths.get(name, (name,))
        if len(path) == 1 or (len(path) == 2 and path[0] in _STATES):
            by_key.setdefault(path[-1], name)
    for key in keys:
        name = by_key.get(key, "")
        stored = metadata.stored.get(part_key(name, ()))
        if stored is None or stored.nbytes > _MAX_STATE_BYTES:
            continue
        found = files.open(stored)
        try:
            archive = TorchZip(found)
        except CheckpointError:  # written in another way: not known
            continue
        value = archive.root
        if type(value) is TensorView and value.dtype.kind == "integer" and value.shape == ():
            place = place_view(found, archive, name, value)
            raw = found.read(place.offset, value.dtype.itemsize)
            value = int.from_bytes(raw, "little", signed=True)
        if type(value) is int and 0 <= value < _MAX_SIZE:
            return value
    return None
