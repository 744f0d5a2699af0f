"""Every decision and every refusal about one average, taken from headers alone.

Pure: reads no tensor data, writes nothing, knows no device. What the plan accepts can only fail
for reasons that no header tells: a read error, a non-finite value, a full disk.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import groupby

from ckptavg.checkpoint import Checkpoint
from ckptavg.errors import IncompatibleCheckpointsError
from ckptavg.hub import split_into_shards
from ckptavg.recipe import CoefficientRow, Recipe, coefficient_row
from ckptavg.tensors import (
    DTYPE_BY_NAME,
    FLOAT32,
    DType,
    FileStamp,
    Piece,
    TensorInfo,
)

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
TAKE_CHUNK_NBYTES = 2**20
_MAX_DIFFERENCES_SHOWN = 5

# integer weights of GPTQ, AWQ, bitsandbytes, compressed-tensors and HQQ, and what goes with them
_QUANTISED_WEIGHT = re.compile(r"(^|[._])(weight|qweight|qzeros|weight_packed|W_q|packed_weight)$")
_QUANTISATION_STATE = re.compile(r"\.(quant_state\.\S+|absmax|quant_map|SCB)$")
_LORA_FACTOR = re.compile(r"\.lora_(A|B|embedding_A|embedding_B)\b")
_BATCHNORM_STATISTIC = re.compile(r"(^|\.)running_(mean|var)$")
_HINT_PREFIXES = ("module.", "_orig_mod.", "model.")


class Action(Enum):
    """What becomes of a tensor."""

    AVERAGE = "average"  # the weighted mean, rounded once to the output dtype
    TAKE = "take"  # integers and bools: copied; where checkpoints differ, from one of them
    ALIAS = "alias"  # tied: the same bytes as another name, averaged once


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        name: Its name.
        info: dtype and shape in the checkpoints.
        output_dtype: dtype in the output.
        action: What becomes of it.
        owner: For an alias, the name it is tied to.
        shard: Index of its output shard.
        offset: First byte in the data of that shard.
    """

    name: str
    info: TensorInfo
    output_dtype: DType
    action: Action
    owner: str | None
    shard: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.info.numel * self.output_dtype.itemsize


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file: its name, the bytes of its data, its tensors in the order of the data."""

    filename: str
    nbytes: int
    tensor_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of consecutive output elements, small enough to be worked on at once.

    Attributes:
        pieces: The input bytes, the same in every checkpoint.
        numel: Number of elements; a complex number counts as two.
        dtype: dtype of the input elements; complex64 is worked on as pairs of float32.
        output_dtype: dtype of the output elements.
        action: AVERAGE or TAKE.
        destinations: (shard index, first byte in its data) of every place the result goes to.
    """

    pieces: tuple[Piece, ...]
    numel: int
    dtype: DType
    output_dtype: DType
    action: Action
    destinations: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes read from each checkpoint."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class AveragePlan:
    """All decisions about one average.

    Attributes:
        recipe: What was asked for.
        rows: One row of coefficients an output.
        labels, steps, epochs, files: The checkpoints, oldest first.
        tensors: The output's tensors, in the order of the output.
        shards: The output's weight files.
        metadata: String map for the output's weight files: tied names that were declared.
        take_from: Index of the checkpoint that gives tensors with the action TAKE.
        notes: What a user should know about the decisions, one sentence each.
    """

    recipe: Recipe
    rows: tuple[CoefficientRow, ...]
    labels: tuple[str, ...]
    steps: tuple[int | None, ...]
    epochs: tuple[int | None, ...]
    files: tuple[tuple[FileStamp, ...], ...]
    tensors: tuple[TensorPlan, ...]
    shards: tuple[ShardPlan, ...]
    metadata: Mapping[str, str]
    take_from: int
    notes: tuple[str, ...]

    @cached_property
    def total_nbytes(self) -> int:
        """Bytes of all tensors in the output."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def read_nbytes(self) -> int:
        """Bytes that will be read from all checkpoints together; tied tensors once."""
        averaged = sum(tensor.info.nbytes for tensor in self.with_action(Action.AVERAGE))
        taken = sum(tensor.info.nbytes for tensor in self.with_action(Action.TAKE))
        return averaged * len(self.used_checkpoints) + taken * self.n_checkpoints

    @property
    def n_checkpoints(self) -> int:
        """How many checkpoints go in."""
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with the inputs, the recipe or the output."""
        what = (self.recipe, self.rows, self.files, self.tensors, self.shards, self.metadata)
        return hashlib.sha256(repr(what).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @cached_property
    def used_checkpoints(self) -> tuple[int, ...]:
        """Indices of the checkpoints whose coefficient is not 0 in every row."""
        return tuple(
            index
            for index in range(len(self.labels))
            if any(row.multipliers[index] != 0 for row in self.rows)
        )

    @property
    def changed_dtype(self) -> DType | None:
        """The dtype that the recipe changes averaged tensors to; None if they keep their own."""
        return None if self.recipe.dtype == "same" else DTYPE_BY_NAME[self.recipe.dtype]

    @property
    def batchnorm_names(self) -> tuple[str, ...]:
        """Names of averaged BatchNorm statistics, which a BN pass should replace."""
        return tuple(
            tensor.name for tensor in self.tensors if _BATCHNORM_STATISTIC.search(tensor.name)
        )

    @cached_property
    def arithmetic_dtypes(self) -> set[tuple[DType, DType]]:
        """The (input, output) dtypes of averaged chunks."""
        return {
            (FLOAT32, FLOAT32)
            if tensor.info.dtype.kind == "complex"
            else (tensor.info.dtype, tensor.output_dtype)
            for tensor in self.with_action(Action.AVERAGE)
        }

    def with_action(self, action: Action) -> tuple[TensorPlan, ...]:
        """Return the tensors with one action."""
        return tuple(tensor for tensor in self.tensors if tensor.action is action)

    def chunks(self, max_nbytes: int) -> Iterator[Chunk]:
        """Cut the work into chunks, in the order of the output.

        Neighbours in the output with the same dtypes and action share chunks, so thousands of
        small tensors cost no more than one large one.

        Args:
            max_nbytes: Upper bound for the input bytes of a chunk from one checkpoint.
                Chunks to be copied are never larger than ``TAKE_CHUNK_NBYTES``.
        """
        copies: dict[str, list[TensorPlan]] = {}
        for tensor in self.with_action(Action.ALIAS):
            if tensor.owner is not None:
                copies.setdefault(tensor.owner, []).append(tensor)
        stored = [
            tensor
            for tensor in self.tensors
            if tensor.action is not Action.ALIAS and tensor.nbytes > 0
        ]

        def span_key(tensor: TensorPlan) -> tuple[object, ...]:
            alone = tensor.name if tensor.name in copies else None
            return tensor.shard, tensor.info.dtype, tensor.output_dtype, tensor.action, alone

        for _, tensors in groupby(stored, span_key):
            span = list(tensors)
            limit = (
                min(max_nbytes, TAKE_CHUNK_NBYTES) if span[0].action is Action.TAKE else max_nbytes
            )
            yield from _cut(span, copies, limit)


def plan_average(
    checkpoints: Sequence[Checkpoint],
    recipe: Recipe,
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    notes: Sequence[str] = (),
) -> AveragePlan:
    """Decide everything about averaging these checkpoints.

    Names, order and side files of the output are those of the last checkpoint.

    Args:
        checkpoints: Opened checkpoints, oldest first.
        recipe: What to compute.
        max_shard_bytes: Upper bound for an output file, unless one tensor is larger.
        notes: What is known already; the plan's own notes follow.

    Raises:
        IncompatibleCheckpointsError: If names, shapes or dtypes differ, nothing can be averaged,
            or the tensors are quantised.
        UsageError: If the recipe's coefficients do not match the checkpoints.
    """
    if not checkpoints:
        raise IncompatibleCheckpointsError("nothing to average: no checkpoints")
    row = coefficient_row(recipe, len(checkpoints))
    reference = checkpoints[-1]
    for checkpoint in checkpoints:
        _refuse_unaveragable(checkpoint)
    for checkpoint in checkpoints[:-1]:
        _refuse_differences(checkpoint, reference)

    plan_notes = [*notes]
    for checkpoint in checkpoints:
        plan_notes.extend(f"{checkpoint.label}: {note}" for note in checkpoint.notes)
    owners, tie_notes = _tied_names(checkpoints)
    plan_notes.extend(tie_notes)
    n_factors = sum(map(bool, map(_LORA_FACTOR.search, reference.tensors)))
    if n_factors:
        plan_notes.append(
            f"{n_factors} tensors are LoRA factors: the mean of the factors is only near the mean "
            "of their products, and only for checkpoints of one run"
        )
    outputs = {name: _output_dtype(info, recipe) for name, info in reference.tensors.items()}
    tensors, shards = _lay_out(reference.tensors, outputs, owners, max_shard_bytes)
    used = [index for index, multiplier in enumerate(row.multipliers) if multiplier != 0]
    take_from = used[0] if recipe.buffers == "first" else used[-1]
    return AveragePlan(
        recipe=recipe,
        rows=(row,),
        labels=tuple(checkpoint.label for checkpoint in checkpoints),
        steps=tuple(checkpoint.step for checkpoint in checkpoints),
        epochs=tuple(checkpoint.epoch for checkpoint in checkpoints),
        files=tuple(tuple(checkpoint.files) for checkpoint in checkpoints),
        tensors=tensors,
        shards=shards,
        metadata={
            name: owner
            for name, owner in reference.metadata.items()
            if reference.aliases.get(name) == owner
        },
        take_from=take_from,
        notes=tuple(dict.fromkeys(plan_notes)),
    )


def _cut(
    span: Sequence[TensorPlan], copies: Mapping[str, Sequence[TensorPlan]], max_nbytes: int
) -> Iterator[Chunk]:
    first = span[0]
    info_dtype, scale = first.info.dtype, 1
    output_dtype = first.output_dtype
    if info_dtype.kind == "complex":  # real and imaginary parts are averaged alike
        info_dtype, output_dtype, scale = FLOAT32, FLOAT32, 2
    itemsize = info_dtype.itemsize
    # an even number of elements, so that pairs of 16-bit values are never split
    max_nbytes = max(max_nbytes // (2 * itemsize), 1) * 2 * itemsize
    places = [(tensor.shard, tensor.offset) for tensor in (first, *copies.get(first.name, ()))]

    pieces: list[Piece] = []
    filled = done = 0  # input bytes of this chunk, elements in earlier chunks

    def chunk() -> Chunk:
        return Chunk(
            tuple(pieces),
            filled // itemsize,
            info_dtype,
            output_dtype,
            first.action,
            tuple((shard, offset + done * output_dtype.itemsize) for shard, offset in places),
        )

    for tensor in span:
        start, total = 0, tensor.info.numel * scale * itemsize
        while start < total:
            stop = min(total, start + max_nbytes - filled)
            pieces.append(Piece(tensor.name, start, stop))
            filled += stop - start
            start = stop
            if filled == max_nbytes:
                yield chunk()
                done += filled // itemsize
                pieces, filled = [], 0
    if filled:
        yield chunk()


def _refuse_unaveragable(checkpoint: Checkpoint) -> None:
    def refuse(what: str) -> IncompatibleCheckpointsError:
        return IncompatibleCheckpointsError(f"{checkpoint.label}: {what}")

    for name, info in checkpoint.tensors.items():
        is_packed = info.dtype.kind == "integer" and (
            _QUANTISED_WEIGHT.search(name) or _QUANTISATION_STATE.search(name)
        )
        if info.dtype.kind == "quantised" or is_packed or _QUANTISATION_STATE.search(name):
            raise refuse(
                f"tensor '{name}' of {info.dtype} is quantised; average the full-precision weights"
            )
        if name == "__metadata__":
            raise refuse("a tensor is called '__metadata__', a name that safetensors reserves")
        if info.dtype.code is None:
            raise refuse(f"tensor '{name}' is {info.dtype}, which safetensors cannot store")
    if not any(info.dtype.kind in ("float", "complex") for info in checkpoint.tensors.values()):
        raise refuse("nothing to average: it holds no floating-point tensors")


def _refuse_differences(checkpoint: Checkpoint, reference: Checkpoint) -> None:
    """Compare names, shapes and dtypes; tied names may be stored in one and not in the other."""
    mine, theirs = set(checkpoint.tensors), set(reference.tensors)
    missing = [name for name in reference.tensors if name not in mine | checkpoint.aliases.keys()]
    extra = [name for name in checkpoint.tensors if name not in theirs | reference.aliases.keys()]
    differences = [
        f"'{name}' is in {reference.label}, not in {checkpoint.label}" for name in missing
    ]
    differences += [
        f"'{name}' is in {checkpoint.label}, not in {reference.label}" for name in extra
    ]
    hint = _prefix_hint(missing, extra)
    for name, info in reference.tensors.items():
        other = _info(checkpoint, name)
        if other is None or other == info:
            continue
        if other.shape != info.shape:
            differences.append(
                f"'{name}' has shape {list(other.shape)} in {checkpoint.label}, "
                f"{list(info.shape)} in {reference.label}"
            )
            hint = hint or "are they from the same run?"
        else:
            differences.append(
                f"'{name}' is {other.dtype} in {checkpoint.label}, "
                f"{info.dtype} in {reference.label}"
            )
            hint = hint or "average checkpoints of one dtype"
    if differences:
        shown = "; ".join(differences[:_MAX_DIFFERENCES_SHOWN])
        more = len(differences) - _MAX_DIFFERENCES_SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        ending = f" ({hint})" if hint else ""
        raise IncompatibleCheckpointsError(f"the checkpoints differ: {shown}{rest}{ending}")


def _prefix_hint(missing: Sequence[str], extra: Sequence[str]) -> str:
    """Suggest the prefix that would make the names agree, if one would."""
    for longer, shorter in ((missing, extra), (extra, missing)):
        for name in longer[:1]:
            parts = name.split(".")
            tried = [".".join(parts[:count]) + "." for count in range(1, len(parts))]
            for prefix in (*_HINT_PREFIXES, *tried):
                if name.startswith(prefix) and name.removeprefix(prefix) in shorter:
                    return f"pass --strip-prefix {prefix}"
    return ""


def _info(checkpoint: Checkpoint, name: str) -> TensorInfo | None:
    return checkpoint.tensors.get(name) or checkpoint.tensors.get(checkpoint.aliases.get(name, ""))


def _tied_names(checkpoints: Sequence[Checkpoint]) -> tuple[dict[str, str], list[str]]:
    """Return tied name -> owner for the output, and notes on ties that are not the same everywhere.

    A pair is tied if every checkpoint either stores one of the two, or says that they share
    storage; then both get the same bytes.

    Raises:
        IncompatibleCheckpointsError: If a tensor that the last checkpoint does not store is a
            tensor of its own in another.
    """
    reference = checkpoints[-1]
    owners: dict[str, str] = {}
    notes = []
    for name, owner in reference.aliases.items():
        apart = [
            one for one in checkpoints if _storage_name(one, name) != _storage_name(one, owner)
        ]
        if name in reference.tensors and not apart:
            owners[name] = owner
        elif name in reference.tensors:
            notes.append(
                f"'{name}' is tied to '{owner}' in {reference.label}, but stored apart in "
                f"{apart[0].label}: each is averaged by itself"
            )
        elif apart:
            raise IncompatibleCheckpointsError(
                f"'{name}' is stored apart in {apart[0].label}, but only as the tied '{owner}' in "
                f"{reference.label}; average checkpoints that agree on it"
            )
    return owners, notes


def _storage_name(checkpoint: Checkpoint, name: str) -> str:
    return checkpoint.aliases.get(name, name)


def _output_dtype(info: TensorInfo, recipe: Recipe) -> DType:
    if info.dtype.kind == "float" and recipe.dtype != "same":
        return DTYPE_BY_NAME[recipe.dtype]
    return info.dtype


def _lay_out(
    infos: Mapping[str, TensorInfo],
    output_dtypes: Mapping[str, DType],
    owners: Mapping[str, str],
    max_shard_bytes: int,
) -> tuple[tuple[TensorPlan, ...], tuple[ShardPlan, ...]]:
    """Place every tensor: widest dtype first, so that each lies aligned to its own element size."""
    sizes = {name: info.numel * output_dtypes[name].itemsize for name, info in infos.items()}
    if sum(sizes.values()) <= max_shard_bytes:
        names_by_file = {"model.safetensors": list(sizes)}
    else:
        names_by_file = split_into_shards(sizes, max_shard_bytes)
    tensors, shards = [], []
    for shard, (filename, names) in enumerate(sorted(names_by_file.items())):
        names = sorted(names, key=lambda name: -output_dtypes[name].itemsize)
        offset = 0
        for name in names:
            kind = infos[name].dtype.kind
            action = Action.AVERAGE if kind in ("float", "complex") else Action.TAKE
            tensors.append(
                TensorPlan(
                    name=name,
                    info=infos[name],
                    output_dtype=output_dtypes[name],
                    action=Action.ALIAS if name in owners else action,
                    owner=owners.get(name),
                    shard=shard,
                    offset=offset,
                )
            )
            offset += sizes[name]
        shards.append(ShardPlan(filename, offset, tuple(names)))
    return tuple(tensors), tuple(shards)
