"""The whole tool on one screen: one function a command.

sources -> checkpoints (headers only) -> plan -> average -> writer -> [BatchNorm pass] -> publish
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptavg._version import __version__
from ckptavg.average import (
    DEFAULT_MEMORY_BUDGET_BYTES,
    Workspace,
    average,
    choose_device,
    size_workspace,
)
from ckptavg.checkpoint import Checkpoint, normalise_names, open_checkpoint
from ckptavg.errors import CkptavgError, ModelError
from ckptavg.memory import peak_device_bytes, peak_host_bytes
from ckptavg.plan import DEFAULT_MAX_SHARD_BYTES, AveragePlan, plan_average
from ckptavg.provenance import provenance, weight_file_metadata
from ckptavg.recipe import Accumulate, Buffers, OutputDType, Recipe
from ckptavg.side_files import find_side_files, read_side_file
from ckptavg.sources import close_all, open_sources, order_by_position
from ckptavg.tensors import DTYPE_BY_NAME, FileStamp, TensorInfo
from ckptavg.writer import PROVENANCE_NAME, ModelWriter, check_destination

if TYPE_CHECKING:  # importing torch takes longer than averaging most models
    from torch import nn

    from ckptavg.batchnorm import BnReport, Forward

Source = str | Path
Progress = Callable[[str, int, int | None], None]  # stage, done since the last call, total


@dataclass(frozen=True, kw_only=True)
class BnPass:
    """A model and the data to recompute its BatchNorm statistics with.

    Attributes:
        model: The module, or a function without arguments that builds it. Its weights are replaced.
        batches: An iterable of batches, or a function without arguments that returns one.
        forward: ``forward(model, batch)`` runs the model; None passes tensors and first items of
            tuples as they are, and mappings as keyword arguments.
        max_batches, max_samples: Where to stop; None uses all data.
    """

    model: nn.Module | Callable[[], nn.Module]
    batches: Iterable[Any] | Callable[[], Iterable[Any]]
    forward: Forward | None = None
    max_batches: int | None = None
    max_samples: int | None = None


@dataclass(frozen=True, kw_only=True)
class AverageResult:
    """What a run did.

    Attributes:
        output: The published directory.
        n_checkpoints: How many checkpoints went in.
        device: Where the arithmetic ran.
        read_nbytes, written_nbytes: Bytes of tensor data.
        seconds: Wall time of everything; ``average_seconds`` of reading, averaging and writing.
        peak_host_bytes: Largest resident memory of the process; None where it cannot be told.
        peak_device_bytes: Largest memory allocated on the CUDA device; None on a CPU.
        differing: Integer and bool tensors that differed and were taken from ``taken_from``.
        notes: What the user should know.
        batchnorm: What the BatchNorm pass did; None without one.
    """

    output: Path
    n_checkpoints: int
    device: str
    read_nbytes: int
    written_nbytes: int
    seconds: float
    average_seconds: float
    peak_host_bytes: int | None
    peak_device_bytes: int | None
    differing: tuple[str, ...]
    taken_from: str
    notes: tuple[str, ...]
    batchnorm: BnReport | None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything decided, nothing read: what ``--dry-run`` shows."""

    checkpoints: Sequence[Checkpoint]
    plan: AveragePlan
    workspace: Workspace


def average_checkpoints(
    sources: Sequence[Source],
    output: Source,
    *,
    coefficients: Sequence[float] | None = None,
    accumulate: Accumulate = "auto",
    dtype: OutputDType = "same",
    buffers: Buffers = "last",
    allow_nonfinite: bool = False,
    state_key: str | None = None,
    strip_prefixes: Sequence[str] = (),
    batchnorm: BnPass | None = None,
    device: str = "auto",
    memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
    n_threads: int | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    overwrite: bool = False,
    include_code: bool = True,
    progress: Progress | None = None,
) -> AverageResult:
    """Average saved checkpoints into one safetensors model directory.

    With ``batchnorm``, the averaged model's BatchNorm statistics are recomputed before anything is
    published. The output appears complete or not at all.

    Args:
        sources: Checkpoint files and directories, globs, ``{a..b..step}`` and ``{a,b}`` patterns.
            They are ordered by training step (or epoch) where all tell theirs, else as given.
        output: The model directory to make.
        coefficients: One a checkpoint, in the order of the sources; None is the uniform mean.
        accumulate: dtype of the sums; see ``Recipe``.
        dtype: dtype of averaged tensors in the output; ``same`` keeps the inputs'.
        buffers: Which checkpoint gives integer and bool tensors that differ.
        allow_nonfinite: Keep infinity and NaN instead of refusing them.
        state_key: The entry of torch files that holds the weights, such as ``ema``.
        strip_prefixes: Prefixes to remove from tensor names.
        batchnorm: Model and data for the BatchNorm pass.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
        memory_budget_bytes: Upper bound for the buffers in host memory.
        n_threads: Threads that read; None chooses by the machine.
        max_shard_bytes: Upper bound for an output file, unless one tensor is larger.
        overwrite: Replace an existing model directory, in one step at the end.
        include_code: Copy ``*.py`` files of the model directory; they are never run.
        progress: Called as work gets done: stage (``average`` in bytes, ``batchnorm`` in samples),
            amount since the last call, total if known.

    Raises:
        CkptavgError: One of its subclasses; see ``ckptavg.errors``. Nothing is published then,
            except with AfterPublishError.
    """
    started = time.perf_counter()
    output = Path(output)
    recipe = Recipe(
        coefficients=None if coefficients is None else tuple(coefficients),
        accumulate=accumulate,
        dtype=dtype,
        buffers=buffers,
        allow_nonfinite=allow_nonfinite,
    )
    with prepared_average(
        sources,
        output,
        recipe,
        state_key=state_key,
        strip_prefixes=strip_prefixes,
        device=device,
        memory_budget_bytes=memory_budget_bytes,
        n_threads=n_threads,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        runs_model=batchnorm is not None,
    ) as prepared:
        checkpoints, plan, workspace = prepared.checkpoints, prepared.plan, prepared.workspace
        model = None if batchnorm is None else _build_model(batchnorm, prepared)
        metadata = weight_file_metadata(plan, __version__)
        with ModelWriter(output, plan, metadata=metadata, overwrite=overwrite) as writer:
            averaging = time.perf_counter()
            outcome = average(
                plan, checkpoints, [writer], workspace,
                progress=_stage(progress, "average", plan.read_nbytes),
            )  # fmt: skip
            for checkpoint in checkpoints:
                checkpoint.check_unchanged()
            average_seconds = time.perf_counter() - averaging
            side_files, side_notes = _copy_side_files(checkpoints[-1], plan, writer, include_code)
            report = None
            if batchnorm is not None and model is not None:
                report = _recompute_batchnorm(model, batchnorm, plan, writer, progress)
            notes = (*plan.notes, *side_notes, *_batchnorm_notes(plan, report))
            writer.add_file(
                PROVENANCE_NAME,
                provenance(
                    plan,
                    version=__version__,
                    device=workspace.device,
                    differing=outcome.differing,
                    notes=notes,
                    side_files=side_files,
                    batchnorm=None if report is None else asdict(report),
                ),
            )
            writer.publish()
    return AverageResult(
        output=output,
        n_checkpoints=plan.n_checkpoints,
        device=workspace.device,
        read_nbytes=plan.read_nbytes,
        written_nbytes=plan.total_nbytes,
        seconds=time.perf_counter() - started,
        average_seconds=average_seconds,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(workspace.device),
        differing=tuple(outcome.differing),
        taken_from=plan.labels[plan.take_from],
        notes=notes,
        batchnorm=report,
    )


@contextmanager
def prepared_average(
    sources: Sequence[Source],
    output: Source,
    recipe: Recipe,
    *,
    state_key: str | None = None,
    strip_prefixes: Sequence[str] = (),
    device: str = "auto",
    memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
    n_threads: int | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    overwrite: bool = False,
    runs_model: bool = False,
) -> Iterator[Prepared]:
    """Open the sources, decide everything from headers, and close them at the end.

    Args as in ``average_checkpoints``; explicit coefficients follow the order of the sources, and
    ``runs_model`` tells whether a BatchNorm pass will follow.
    """
    opened, notes = open_sources(sources, state_key=state_key)
    try:
        order = order_by_position(opened)
        if order != list(range(len(opened))):
            notes.append("checkpoints are in the order of training, not as typed")
            recipe = recipe.reordered(order)
        checkpoints, naming_notes = normalise_names(
            [opened[index] for index in order], strip_prefixes
        )
        plan = plan_average(
            checkpoints, recipe, max_shard_bytes=max_shard_bytes, notes=[*notes, *naming_notes]
        )
        workspace = size_workspace(
            plan,
            choose_device(device, read_nbytes=plan.read_nbytes, runs_model=runs_model),
            memory_budget_bytes=memory_budget_bytes,
            n_threads=n_threads,
        )
        check_destination(
            Path(output),
            overwrite=overwrite,
            needed_bytes=plan.total_nbytes,
            inputs=[file for files in plan.files for file in files],
            input_directories=[one.directory for one in checkpoints if one.directory],
        )
        yield Prepared(checkpoints=checkpoints, plan=plan, workspace=workspace)
    finally:
        close_all(opened)


def recompute_bn(
    source: Source, output: Source, batchnorm: BnPass, **options: Any
) -> AverageResult:
    """Recompute the BatchNorm statistics of one saved model; everything else stays bit for bit.

    Args:
        source: A checkpoint file or model directory.
        output: The model directory to make.
        batchnorm: Model and data.
        options: ``state_key``, ``strip_prefixes``, ``device``, ``memory_budget_bytes``,
            ``n_threads``, ``max_shard_bytes``, ``overwrite``, ``include_code`` and ``progress`` of
            ``average_checkpoints``.

    Raises:
        BatchNormError: If the model has no BatchNorm layers with running statistics, or the
            pass fails.
        CkptavgError: As ``average_checkpoints`` does.
    """
    # the average of one checkpoint is that checkpoint
    return average_checkpoints(
        [source], output, batchnorm=batchnorm, allow_nonfinite=True, **options
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What the headers of one checkpoint tell."""

    source: str
    layout: str
    step: int | None
    epoch: int | None
    nbytes: int
    n_parameters: int
    files: tuple[FileStamp, ...]
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())


def inspect_checkpoint(source: Source, *, state_key: str | None = None) -> CheckpointInfo:
    """Read the headers of one checkpoint.

    Raises:
        CheckpointError: If it cannot be read.
    """
    checkpoint = open_checkpoint(source, state_key=state_key)
    try:
        stored = [
            info
            for name, info in checkpoint.tensors.items()
            if checkpoint.aliases.get(name) not in checkpoint.tensors
        ]
        return CheckpointInfo(
            source=checkpoint.label,
            layout=checkpoint.layout,
            step=checkpoint.step,
            epoch=checkpoint.epoch,
            nbytes=sum(info.nbytes for info in stored),
            n_parameters=sum(info.numel for info in stored),
            files=tuple(checkpoint.files),
            tensors=dict(checkpoint.tensors),
            aliases=dict(checkpoint.aliases),
            metadata=dict(checkpoint.metadata),
            notes=tuple(checkpoint.notes),
        )
    finally:
        checkpoint.close()


def _build_model(batchnorm: BnPass, prepared: Prepared) -> nn.Module:
    """Build the user's model and check that the average will fit it, before anything is read."""
    from torch import nn

    from ckptavg.model import check_names

    model = batchnorm.model
    if not isinstance(model, nn.Module):
        with _user_code("building the model"):
            model = model()
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is a {type(model).__name__}, expected a torch.nn.Module")
    last = prepared.checkpoints[-1]
    check_names(model, last.tensors, last.label)
    return model.to(prepared.workspace.device)


def _recompute_batchnorm(
    model: nn.Module,
    batchnorm: BnPass,
    plan: AveragePlan,
    writer: ModelWriter,
    progress: Progress | None,
) -> BnReport:
    """Load what was just written, run the pass, and put the statistics into the written files."""
    from ckptavg.batchnorm import recompute_bn_stats
    from ckptavg.model import bn_buffer_bytes, load_weights

    averaged = open_checkpoint(writer.partial, label=str(writer.output))
    try:
        load_weights(model, averaged)
    finally:
        averaged.close()
    batches = batchnorm.batches
    with _user_code("the BatchNorm pass"):
        if callable(batches) and not isinstance(batches, Iterable):
            batches = batches()
        if not isinstance(batches, Iterable):
            raise ModelError(
                f"the data is a {type(batches).__name__}, expected an iterable of batches"
            )
        report = recompute_bn_stats(
            model,
            batches,
            forward=batchnorm.forward,
            max_batches=batchnorm.max_batches,
            max_samples=batchnorm.max_samples,
            progress=_stage(progress, "batchnorm", batchnorm.max_samples),
        )
    dtypes = {tensor.name: tensor.output_dtype.name for tensor in plan.tensors}
    for name, data in bn_buffer_bytes(model, report, dtypes):
        writer.patch(name, data)
    return report


@contextmanager
def _user_code(doing: str) -> Iterator[None]:
    """Turn what the user's model, data or forward raise into one error; the cause is kept."""
    try:
        yield
    except CkptavgError:
        raise
    except Exception as error:
        raise ModelError(f"{doing} failed: {type(error).__name__}: {error}") from error


def _copy_side_files(
    last: Checkpoint, plan: AveragePlan, writer: ModelWriter, include_code: bool
) -> tuple[list[str], list[str]]:
    """Copy config, tokenizer and the like; return their names and what the user should know."""
    if last.directory is None:
        return [], []
    files, notes = find_side_files(last.directory, include_code=include_code)
    changed = None if plan.recipe.dtype == "same" else DTYPE_BY_NAME[plan.recipe.dtype]
    for file in files:
        writer.add_file(file.name, read_side_file(file, output_dtype=changed))
    return [file.name for file in files], notes


def _batchnorm_notes(plan: AveragePlan, report: BnReport | None) -> list[str]:
    if report is not None and not report.layers:
        return ["the model has no BatchNorm layers with running statistics: no BN pass was needed"]
    if report is not None:
        return [f"BatchNorm layer '{name}' {why}" for name, why in report.skipped.items()]
    if plan.batchnorm_names and plan.n_checkpoints > 1:
        return [
            f"{len(plan.batchnorm_names)} BatchNorm statistics were averaged with the weights; "
            "recompute them on training data: pass --model and --data, or run ckptavg recompute-bn"
        ]
    return []


def _stage(progress: Progress | None, stage: str, total: int | None) -> Callable[[int], None]:
    if progress is None:
        return lambda done: None
    return lambda done: progress(stage, done, total)
