"""Every decision and every refusal about one average, taken from headers alone.

Pure: reads no tensor data, writes nothing, knows no device. What the plan accepts can only fail
for reasons that no header tells: a read error, a non-finite value, a full disk.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from ckptavg import blocks as cutting
from ckptavg._version import __version__
from ckptavg.blocks import TAKE_CHUNK_NBYTES, Action, Chunk, TensorPlan, cut_into_blocks
from ckptavg.checkpoint import ADAPTER_WEIGHTS_NAMES, Checkpoint
from ckptavg.coefficients import CoefficientRow, GaussianNoise
from ckptavg.compatibility import refuse_differences, refuse_unaveragable, tied_names
from ckptavg.derived import (
    NOTHING_DERIVED,
    Derived,
    adapter_configs,
    derive_groups,
    refuse_statistics,
    shapes_that_may_differ,
)
from ckptavg.errors import IncompatibleCheckpointsError, UsageError
from ckptavg.geometry import GramTable
from ckptavg.layout import TORCH_NAME, ShardPlan, lay_out, split_by_size
from ckptavg.recipe import Recipe
from ckptavg.schemes import Positions, Scheme, coefficient_rows, output_names
from ckptavg.tensors import (
    DTYPE_BY_NAME,
    DType,
    FileStamp,
    HubRevision,
    OutputFormat,
    TensorInfo,
)

_DEFAULT_MAX_SHARD_BYTES = 5_000_000_000

_LORA_FACTOR = re.compile(r"\.lora_(A|B|embedding_A|embedding_B)\b")
_BATCHNORM_STATISTIC = re.compile(r"(^|\.)running_(mean|var)$")


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """One of the averages that are made from one pass over the checkpoints.

    Attributes:
        name: Its directory inside the output; empty where it is the only one: the output itself.
        scheme: What was asked for.
        row: The coefficients.
        take_from: Index of the checkpoint that gives tensors with the action TAKE.
    """

    name: str
    scheme: Scheme
    row: CoefficientRow
    take_from: int


@dataclass(frozen=True, kw_only=True)
class AveragePlan:
    """All decisions about one average.

    Attributes:
        recipe: What was asked for.
        outputs: The averages to make.
        labels, steps, epochs, files, hubs: The checkpoints, oldest first.
        places: Their ``places_digest``.
        output_format: How the weights are stored.
        names: The output's tensor names, in the order of the last checkpoint.
        tensors: The output's tensors, in the order of the output.
        shards: The output's weight files.
        metadata: String map for the output's weight files: tied names that were declared.
        read_scratch_nbytes: What reading may hold beside the caller's buffer, for each thread.
        notes: What a user should know about the decisions, one sentence each.
        derived: What is computed in groups of tensors.
        compares: Whether inner products of the checkpoints are computed along.
    """

    recipe: Recipe
    outputs: tuple[OutputPlan, ...]
    labels: tuple[str, ...]
    steps: tuple[int | None, ...]
    epochs: tuple[int | None, ...]
    files: tuple[tuple[FileStamp, ...], ...]
    hubs: tuple[HubRevision | None, ...]
    places: tuple[str, ...]
    output_format: OutputFormat
    names: tuple[str, ...]
    tensors: tuple[TensorPlan, ...]
    shards: tuple[ShardPlan, ...]
    metadata: Mapping[str, str]
    read_scratch_nbytes: int
    notes: tuple[str, ...]
    derived: Derived = NOTHING_DERIVED
    compares: bool = False

    @property
    def rows(self) -> tuple[CoefficientRow, ...]:
        """The coefficients of every output."""
        return tuple(output.row for output in self.outputs)

    @cached_property
    def total_nbytes(self) -> int:
        """Bytes of all tensors in one output."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def write_nbytes(self) -> int:
        """Bytes of all tensors in all outputs."""
        return self.total_nbytes * len(self.outputs)

    @cached_property
    def read_nbytes(self) -> int:
        """Bytes that will be read from all checkpoints together; tied tensors once."""
        return self.read_nbytes_of(range(len(self.blocks))) + self.derived_read_nbytes

    @cached_property
    def derived_read_nbytes(self) -> int:
        """Bytes that what is computed in groups reads, for all outputs."""
        return self.derived.read_nbytes(self.rows)

    def read_nbytes_of(self, blocks: Iterable[int]) -> int:
        """Bytes that some blocks read from all checkpoints together."""
        return sum(self.blocks[block].nbytes for block in blocks) * len(self.used_checkpoints)

    @property
    def is_streamed(self) -> bool:
        """Whether any file is read from the Hub and stored nowhere."""
        return any(stamp.digest for stamps in self.files for stamp in stamps)

    @property
    def n_checkpoints(self) -> int:
        """How many checkpoints go in."""
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with the inputs, the recipe or the output.

        They do not depend on the device, the memory or the number of processes, nor on the number
        that a host gives a shared file system.
        """
        files = [[stamp._replace(device=0) for stamp in stamps] for stamps in self.files]
        what = (
            __version__, self.recipe, self.outputs, files, self.places, self.tensors, self.shards,
            self.metadata, self.derived, cutting.BLOCK_NBYTES,
        )  # fmt: skip
        return hashlib.sha256(repr(what).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @cached_property
    def used_checkpoints(self) -> tuple[int, ...]:
        """Indices of the checkpoints that are read, oldest first: all where nothing is made."""
        used = {index for row in self.rows for index in row.used}
        return tuple(sorted(used if self.outputs else range(self.n_checkpoints)))

    @property
    def draws_noise(self) -> bool:
        """Whether any output has noise added (SWAG)."""
        return any(isinstance(row.statistic, GaussianNoise) for row in self.rows)

    @property
    def changed_dtype(self) -> DType | None:
        """The dtype that the recipe changes averaged tensors to; None if they keep their own."""
        return None if self.recipe.dtype == "same" else DTYPE_BY_NAME[self.recipe.dtype]

    @property
    def batchnorm_names(self) -> tuple[str, ...]:
        """Names of averaged BatchNorm statistics, which a BN pass should replace."""
        return tuple(tensor.name for tensor in self.tensors if is_batchnorm_statistic(tensor.name))

    @cached_property
    def arithmetic_dtypes(self) -> set[tuple[DType, DType]]:
        """The (input, output) dtypes of averaged chunks."""
        return {
            (tensor.info.dtype.part, tensor.output_dtype.part)
            for tensor in self.with_action(Action.AVERAGE)
        }

    def with_action(self, action: Action) -> tuple[TensorPlan, ...]:
        """Return the tensors with one action."""
        return tuple(tensor for tensor in self.tensors if tensor.action is action)

    @cached_property
    def blocks(self) -> tuple[Chunk, ...]:
        """The work, cut into parts of at most ``BLOCK_NBYTES``, in the order of the output.

        What is finished is noted by block, and processes share the work by blocks, so the cut
        depends on nothing but the plan. Neighbours in the output with the same dtypes and action
        share blocks: thousands of small tensors cost no more than one large one.
        """
        return cut_into_blocks(self.tensors)

    def chunks(self, max_nbytes: int, blocks: Iterable[int] | None = None) -> Iterator[Chunk]:
        """Cut blocks into chunks, in the order of the output.

        Args:
            max_nbytes: Upper bound for the input bytes of a chunk from one checkpoint; of a copied
                chunk also ``TAKE_CHUNK_NBYTES``, for all that is kept of it together.
            blocks: Numbers of the blocks; None cuts all.
        """
        take_nbytes = min(max_nbytes, TAKE_CHUNK_NBYTES // self._n_kept)
        for number in range(len(self.blocks)) if blocks is None else blocks:
            block = self.blocks[number]
            yield from block.cut(take_nbytes if block.action is Action.TAKE else max_nbytes)

    def taking_nbytes(self, max_nbytes: int) -> int:
        """Bytes that copying a chunk takes: what is kept for the outputs, and one to compare."""
        taken = (block.nbytes for block in self.blocks if block.action is Action.TAKE)
        chunk_nbytes = min(max(taken, default=0), max_nbytes, TAKE_CHUNK_NBYTES // self._n_kept)
        return (self._n_kept + 1) * chunk_nbytes

    @property
    def _n_kept(self) -> int:
        """How many checkpoints give tensors to copy."""
        return len({output.take_from for output in self.outputs}) or 1


def is_batchnorm_statistic(name: str) -> bool:
    """Tell whether a tensor is a running mean or variance, by its name."""
    return _BATCHNORM_STATISTIC.search(name) is not None


def plan_average(
    checkpoints: Sequence[Checkpoint],
    recipe: Recipe,
    *,
    max_shard_bytes: int | None = None,
    output_format: OutputFormat = "safetensors",
    notes: Sequence[str] = (),
) -> AveragePlan:
    """Decide everything about averaging these checkpoints.

    Names, order and side files of the output are those of the last checkpoint.

    Args:
        checkpoints: Opened checkpoints, oldest first.
        recipe: What to compute.
        max_shard_bytes: Upper bound for an output file, unless one tensor is larger; None is 5 GB.
            Torch files are never split.
        output_format: How the weights are stored.
        notes: What is known already; the plan's own notes follow.

    Raises:
        IncompatibleCheckpointsError: If names, shapes or dtypes differ, nothing can be averaged,
            or the tensors are quantised.
        CheckpointError: If an adapter is not what its config says.
        UsageError: If the recipe's coefficients do not match the checkpoints, it has options for
            adapters and these are none, or there is no such format.
    """
    check_format(output_format, max_shard_bytes)
    if not checkpoints:
        raise IncompatibleCheckpointsError("nothing to average: no checkpoints")
    scheme_notes: list[str] = []
    outputs = _outputs(recipe, checkpoints, scheme_notes)
    reference = checkpoints[-1]
    for checkpoint in checkpoints:
        refuse_unaveragable(checkpoint, output_format)
    configs = adapter_configs(checkpoints, recipe)
    any_shape = shapes_that_may_differ(reference, configs, recipe)
    for checkpoint in checkpoints[:-1]:
        refuse_differences(checkpoint, reference, any_shape=any_shape)
    derived = derive_groups(checkpoints, configs, recipe, [output.row for output in outputs])
    refuse_statistics(derived, [(str(output.scheme), output.row) for output in outputs])

    plan_notes = [*notes]
    for checkpoint in checkpoints:
        plan_notes.extend(f"{checkpoint.label}: {note}" for note in checkpoint.notes)
    owners, tie_notes = tied_names(checkpoints)
    plan_notes.extend([*tie_notes, *derived.notes])
    n_factors = sum(map(bool, map(_LORA_FACTOR.search, reference.tensors)))
    if n_factors and configs is None:
        plan_notes.append(
            f"{n_factors} tensors are LoRA factors: the mean of the factors is only near the mean "
            "of their products, and only for checkpoints of one run"
        )
    plan_notes += scheme_notes
    n_unused = len(checkpoints) - len({index for one in outputs for index in one.row.used})
    if n_unused:
        plan_notes.append(f"{n_unused} of the {len(checkpoints)} checkpoints go into no average")
    infos = {**reference.tensors, **derived.outputs}
    dtypes = {name: _output_dtype(info, recipe) for name, info in infos.items()}
    shared: Mapping[str, str] = {}
    if output_format == "torch":  # what is derived is written under each of its names
        shared = {name: owner for name, owner in owners.items() if name not in derived.outputs}
    if configs is not None:  # PEFT reads an adapter from one file
        files = {ADAPTER_WEIGHTS_NAMES[output_format]: list(infos)}
    elif output_format == "torch":
        files = {TORCH_NAME: list(infos)}
    else:
        files = split_by_size(infos, dtypes, max_shard_bytes or _DEFAULT_MAX_SHARD_BYTES)
    tensors, shards = lay_out(infos, dtypes, owners, files, shared, derived.outputs.keys())
    if configs is not None and max_shard_bytes and shards[0].nbytes > max_shard_bytes:
        plan_notes.append(f"an adapter is one file, here of {shards[0].nbytes} bytes")
    return AveragePlan(
        recipe=recipe,
        outputs=outputs,
        **_about(checkpoints),
        output_format=output_format,
        tensors=tensors,
        shards=shards,
        metadata=_declared_ties(reference, output_format),
        notes=tuple(dict.fromkeys(plan_notes)),
        derived=derived,
    )


def gram_table(plan: AveragePlan) -> GramTable | None:
    """Return where a plan's inner products are collected; None if it does not compare.

    BatchNorm statistics are no weights, and tied weights count once.
    """
    if not plan.compares:
        return None
    shapes = {one.name: one.info.shape for one in plan.with_action(Action.AVERAGE)}
    weights = [
        (name, shapes[name])
        for name in plan.names
        if name in shapes and not is_batchnorm_statistic(name)
    ]
    return GramTable(weights, plan.used_checkpoints)


def plan_comparison(checkpoints: Sequence[Checkpoint], *, notes: Sequence[str]) -> AveragePlan:
    """Decide how checkpoints are compared with each other, as they are stored; nothing is made.

    Args:
        checkpoints: Opened checkpoints, oldest first.
        notes: What is known already; the plan's own notes follow.

    Raises:
        IncompatibleCheckpointsError: If names, shapes or dtypes differ, or there is nothing to
            compare.
    """
    reference = checkpoints[-1]
    for checkpoint in checkpoints:
        refuse_unaveragable(checkpoint, "torch")  # the format that stores everything
    for checkpoint in checkpoints[:-1]:
        refuse_differences(checkpoint, reference)
    plan_notes = [*notes]
    for checkpoint in checkpoints:
        plan_notes.extend(f"{checkpoint.label}: {note}" for note in checkpoint.notes)
    owners, tie_notes = tied_names(checkpoints)
    infos = reference.tensors
    dtypes = {name: info.dtype for name, info in infos.items()}
    tensors, shards = lay_out(infos, dtypes, owners, {TORCH_NAME: list(infos)}, {}, ())
    return AveragePlan(
        recipe=Recipe(),
        outputs=(),
        **_about(checkpoints),
        output_format="torch",
        tensors=tensors,
        shards=shards,
        metadata={},
        notes=tuple(dict.fromkeys([*plan_notes, *tie_notes])),
        compares=True,
    )


def _about(checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """Return what a plan knows of its checkpoints."""
    return {
        "labels": tuple(checkpoint.label for checkpoint in checkpoints),
        "steps": tuple(checkpoint.step for checkpoint in checkpoints),
        "epochs": tuple(checkpoint.epoch for checkpoint in checkpoints),
        "files": tuple(tuple(checkpoint.files) for checkpoint in checkpoints),
        "hubs": tuple(checkpoint.hub for checkpoint in checkpoints),
        "places": tuple(checkpoint.places_digest for checkpoint in checkpoints),
        "names": tuple(checkpoints[-1].tensors),
        "read_scratch_nbytes": max(checkpoint.read_scratch_nbytes for checkpoint in checkpoints),
    }


def check_format(output_format: OutputFormat, max_shard_bytes: int | None) -> None:
    """Refuse a format that is not known, and a bound for files that are never split.

    Raises:
        UsageError: If so.
    """
    known = get_args(OutputFormat)
    if output_format not in known:
        raise UsageError(f"output_format is '{output_format}', expected one of {', '.join(known)}")
    if output_format == "torch" and max_shard_bytes is not None:
        raise UsageError(
            "a torch file is never split: leave out max_shard_bytes (--max-shard-size), or write "
            "safetensors"
        )


def _declared_ties(reference: Checkpoint, output_format: OutputFormat) -> dict[str, str]:
    """Return the tied names that the output does not store but declares, each with its owner.

    A state dict has all names of a model, those that only its config tells included.
    """
    if output_format == "torch":
        return {
            name: owner
            for name, owner in reference.aliases.items()
            if name not in reference.tensors
        }
    return {
        name: owner
        for name, owner in reference.metadata.items()
        if reference.aliases.get(name) == owner
    }


def _outputs(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], notes: list[str]
) -> tuple[OutputPlan, ...]:
    positions = Positions(
        tuple(one.label for one in checkpoints),
        tuple(one.step for one in checkpoints),
        tuple(one.epoch for one in checkpoints),
    )
    rows = [
        (scheme, row)
        for scheme in recipe.schemes
        for _, row in coefficient_rows(scheme, positions, notes)
    ]
    names = output_names(recipe.schemes)
    return tuple(
        OutputPlan(name, scheme, row, row.used[0 if recipe.buffers == "first" else -1])
        for name, (scheme, row) in zip(names, rows, strict=True)
    )


def _output_dtype(info: TensorInfo, recipe: Recipe) -> DType:
    if info.dtype.kind == "float" and recipe.dtype != "same":
        return DTYPE_BY_NAME[recipe.dtype]
    return info.dtype
