"""The whole tool on one screen: one function a command.

sources -> checkpoints (headers only) -> plan -> average -> writer -> [BatchNorm pass] -> publish
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
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
from ckptavg.checkpoint.directory import read_json
from ckptavg.destination import PROVENANCE_NAME, check_destination
from ckptavg.errors import UsageError
from ckptavg.memory import peak_device_bytes, peak_host_bytes
from ckptavg.plan import DEFAULT_MAX_SHARD_BYTES, AveragePlan, plan_average
from ckptavg.provenance import provenance, weight_file_metadata
from ckptavg.recipe import Accumulate, Buffers, OutputDType, Recipe
from ckptavg.results import AverageResult, BnPass, CheckpointInfo, Progress, Source
from ckptavg.side_files import SideFile, copy_side_files, find_side_files
from ckptavg.sources import close_all, expand_sources, open_sources, order_by_position
from ckptavg.writer import ModelWriter

if TYPE_CHECKING:
    from ckptavg.batchnorm import BnReport

    RunBnPass = Callable[[AveragePlan, ModelWriter, Callable[[int], None]], BnReport]

_FEW_SAMPLES_A_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything decided, nothing read: what ``--dry-run`` shows."""

    checkpoints: Sequence[Checkpoint]
    plan: AveragePlan
    workspace: Workspace
    side_files: Sequence[SideFile]
    run_bn_pass: RunBnPass | None
    notes: tuple[str, ...]


def average_checkpoints(
    sources: Source | Sequence[Source],
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
        include_code=include_code,
        batchnorm=batchnorm,
    ) as prepared:
        checkpoints, plan, workspace = prepared.checkpoints, prepared.plan, prepared.workspace
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
            copy_side_files(prepared.side_files, writer, output_dtype=plan.changed_dtype)
            report = None
            if batchnorm is not None and prepared.run_bn_pass is not None:
                report = prepared.run_bn_pass(
                    plan, writer, _stage(progress, "batchnorm", batchnorm.max_samples)
                )
            notes = (*plan.notes, *prepared.notes, *_report_notes(report))
            writer.add_file(
                PROVENANCE_NAME,
                provenance(
                    plan,
                    version=__version__,
                    device=workspace.device,
                    differing=outcome.differing,
                    notes=notes,
                    side_files=[file.name for file in prepared.side_files],
                    derived_from=[_earlier_provenance(one) for one in checkpoints],
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
    sources: Source | Sequence[Source],
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
    include_code: bool = True,
    batchnorm: BnPass | None = None,
) -> Iterator[Prepared]:
    """Open the sources, decide everything from headers, and close them at the end.

    Args as in ``average_checkpoints``; explicit coefficients follow the order of the sources.
    """
    for name, value in (
        ("n_threads", n_threads),
        ("memory_budget_bytes", memory_budget_bytes),
        ("max_shard_bytes", max_shard_bytes),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}, expected at least 1")
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
            choose_device(device, read_nbytes=plan.read_nbytes, runs_model=batchnorm is not None),
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
        side_files, side_notes = find_side_files(
            checkpoints[-1].directory, include_code=include_code
        )
        yield Prepared(
            checkpoints=checkpoints,
            plan=plan,
            workspace=workspace,
            side_files=side_files,
            run_bn_pass=_bn_pass(batchnorm, checkpoints[-1], workspace.device),
            notes=(*side_notes, *_batchnorm_due(plan, batchnorm)),
        )
    finally:
        close_all(opened)


def recompute_bn(
    source: Source,
    output: Source,
    batchnorm: BnPass,
    *,
    state_key: str | None = None,
    strip_prefixes: Sequence[str] = (),
    device: str = "auto",
    memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
    n_threads: int | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    overwrite: bool = False,
    include_code: bool = True,
    progress: Progress | None = None,
) -> AverageResult:
    """Recompute the BatchNorm statistics of one saved model; everything else stays bit for bit.

    Args:
        source: A checkpoint file or model directory.
        output: The model directory to make.
        batchnorm: Model and data.
        state_key: As in ``average_checkpoints``, like all that follow.
        strip_prefixes: Likewise.
        device: Likewise.
        memory_budget_bytes: Likewise.
        n_threads: Likewise.
        max_shard_bytes: Likewise.
        overwrite: Likewise.
        include_code: Likewise.
        progress: Likewise.

    Raises:
        UsageError: If the source is a pattern that names several checkpoints.
        CkptavgError: As ``average_checkpoints`` does.
    """
    paths = expand_sources([source])
    if len(paths) != 1:
        raise UsageError(f"{source}: names {len(paths)} checkpoints, expected one model")
    # the average of one checkpoint is that checkpoint
    return average_checkpoints(
        paths,
        output,
        allow_nonfinite=True,
        batchnorm=batchnorm,
        state_key=state_key,
        strip_prefixes=strip_prefixes,
        device=device,
        memory_budget_bytes=memory_budget_bytes,
        n_threads=n_threads,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        include_code=include_code,
        progress=progress,
    )


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


def _bn_pass(batchnorm: BnPass | None, checkpoint: Checkpoint, device: str) -> RunBnPass | None:
    """Build the user's model; return what will run the BatchNorm pass on the written average."""
    if batchnorm is None:
        return None
    # imported here: importing torch takes longer than averaging most models
    from ckptavg.bn_pass import build_model, recompute_written

    return partial(recompute_written, build_model(batchnorm, checkpoint, device), batchnorm)


def _earlier_provenance(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return how a checkpoint was made, if ckptavg made it."""
    if checkpoint.directory is None:
        return None
    path = Path(checkpoint.directory) / PROVENANCE_NAME
    return read_json(path, str(path))


def _batchnorm_due(plan: AveragePlan, batchnorm: BnPass | None) -> list[str]:
    if batchnorm is not None or not plan.batchnorm_names or plan.n_checkpoints == 1:
        return []
    return [
        f"{len(plan.batchnorm_names)} BatchNorm statistics are averaged with the weights; "
        "recompute them on training data: pass --model and --data, or run ckptavg recompute-bn"
    ]


def _report_notes(report: BnReport | None) -> list[str]:
    if report is None:
        return []
    notes = [f"BatchNorm layer '{name}' {why}" for name, why in report.skipped.items()]
    if not report.layers and not report.skipped:
        notes.append("the model has no BatchNorm layers: no BN pass was needed")
    if report.layers and report.n_samples < _FEW_SAMPLES_A_BATCH * report.n_batches:
        notes.append(
            f"BatchNorm statistics come from batches of about "
            f"{max(report.n_samples // report.n_batches, 1)} samples; batches of 128 or more are "
            "closer to what the model will meet"
        )
    return notes


def _stage(progress: Progress | None, stage: str, total: int | None) -> Callable[[int], None]:
    if progress is None:
        return lambda done: None
    return lambda done: progress(stage, done, total)
