"""The whole tool on one screen: one function a command.

sources -> checkpoints (headers only) -> plan -> average -> writer -> [BatchNorm pass] -> publish
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptavg._version import __version__
from ckptavg.average import (
    DEFAULT_MEMORY_BUDGET_BYTES,
    Job,
    Timings,
    average,
)
from ckptavg.checkpoint import open_checkpoint
from ckptavg.destination import PROVENANCE_NAME
from ckptavg.errors import ProcessError, UsageError
from ckptavg.memory import peak_device_bytes, peak_host_bytes
from ckptavg.output import OutputDirectory
from ckptavg.plan import DEFAULT_MAX_SHARD_BYTES
from ckptavg.prepare import Prepared, chosen_schemes, prepared_average
from ckptavg.processes import Processes, joined_processes
from ckptavg.provenance import earlier_provenance, provenance, weight_file_metadata
from ckptavg.recipe import Accumulate, Buffers, OutputDType, Recipe, Scheme
from ckptavg.results import (
    AverageResult,
    BnPass,
    CheckpointInfo,
    OutputResult,
    Progress,
    Source,
    StageTimes,
)
from ckptavg.side_files import copy_side_files
from ckptavg.sources import expand_sources

if TYPE_CHECKING:
    from ckptavg.batchnorm import BnReport
    from ckptavg.bn_pass import BnOutcome

_FEW_SAMPLES_A_BATCH = 16


def average_checkpoints(
    sources: Source | Sequence[Source],
    output: Source,
    *,
    schemes: str | Scheme | Sequence[str | Scheme] = (),
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
    distributed: bool = False,
    progress: Progress | None = None,
) -> AverageResult:
    """Average saved checkpoints into one safetensors model directory, or several at once.

    With ``batchnorm``, the averaged model's BatchNorm statistics are recomputed before anything is
    published. The output appears complete or not at all. A run that was interrupted (not one that
    failed) is continued when it is called again with the same inputs and options.

    Args:
        sources: Checkpoint files and directories, globs, ``{a..b..step}`` and ``{a,b}`` patterns.
            They are ordered by training step (or epoch) where all tell theirs, else as given.
        output: The model directory to make; with several schemes the directory of one model
            directory each.
        schemes: What to average, such as ``uniform:last=5``; see ``parse_scheme`` and ``Scheme``.
            One pass over the checkpoints makes all averages. None given is the uniform mean.
        coefficients: Short for one scheme: one multiplier a checkpoint, in the order of the
            sources.
        accumulate: dtype of the sums; see ``Recipe``.
        dtype: dtype of averaged tensors in the output; ``same`` keeps the inputs'.
        buffers: Which checkpoint gives integer and bool tensors that differ.
        allow_nonfinite: Keep infinity and NaN instead of refusing them.
        state_key: The entry of torch files that holds the weights, such as ``ema``.
        strip_prefixes: Prefixes to remove from tensor names.
        batchnorm: Model and data for the BatchNorm pass.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
        memory_budget_bytes: Upper bound for the buffers in host memory, of each process.
        n_threads: Threads that read; None chooses by the machine.
        max_shard_bytes: Upper bound for an output file, unless one tensor is larger.
        overwrite: Replace an existing output, in one step at the end.
        include_code: Copy ``*.py`` files of the model directory; they are never run.
        distributed: Share the work with the other processes that torchrun started; all of them
            call this with the same arguments, and see the same file system.
        progress: Called as work gets done: stage (``average`` in bytes, ``batchnorm`` in samples),
            amount since the last call, total if known.

    Raises:
        CkptavgError: One of its subclasses; see ``ckptavg.errors``. Nothing is published then,
            except with AfterPublishError.
    """
    started = time.perf_counter()
    output = Path(output)
    recipe = Recipe(
        schemes=chosen_schemes(schemes, coefficients),
        accumulate=accumulate,
        dtype=dtype,
        buffers=buffers,
        allow_nonfinite=allow_nonfinite,
    )
    with joined_processes(distributed=distributed) as processes, ExitStack() as stack:
        prepared = _prepare_together(
            processes, stack, sources, output, recipe,
            state_key=state_key,
            strip_prefixes=strip_prefixes,
            device=device,
            memory_budget_bytes=memory_budget_bytes,
            n_threads=n_threads,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            include_code=include_code,
            batchnorm=batchnorm,
        )  # fmt: skip
        plan, workspace = prepared.plan, prepared.workspace
        directory = OutputDirectory(
            output,
            plan,
            metadata=[weight_file_metadata(plan, one, __version__) for one in plan.outputs],
            overwrite=overwrite,
            rank=processes.rank,
        )
        before = _enter_together(processes, stack, directory)
        averaging = time.perf_counter()
        averaged = _average_together(processes, prepared, directory, before, progress)
        average_seconds = time.perf_counter() - averaging
        outcomes = _recompute_bn(processes, prepared, directory, batchnorm, progress)
        notes = (
            *plan.notes, *prepared.notes, *directory.notes,
            *(note for one in outcomes if one is not None for note in _report_notes(one.report)),
        )  # fmt: skip
        publishing = time.perf_counter()
        processes.first(
            lambda: _finish(prepared, directory, averaged.differing, list(notes), outcomes)
        )
        publish_seconds = time.perf_counter() - publishing
    return AverageResult(
        output=output,
        outputs=tuple(
            OutputResult(
                path=output / one.name,
                scheme=str(one.scheme),
                coefficients=one.row.coefficients,
                differing=tuple(averaged.differing[index]),
                taken_from=plan.labels[one.take_from],
                **_outcome(outcomes[index]),
            )
            for index, one in enumerate(plan.outputs)
        ),
        n_checkpoints=plan.n_checkpoints,
        n_processes=processes.size,
        device=workspace.device,
        read_nbytes=plan.read_nbytes,
        written_nbytes=plan.write_nbytes,
        resumed_nbytes=plan.read_nbytes_of(before),
        seconds=time.perf_counter() - started,
        average_seconds=average_seconds,
        times=StageTimes(
            read_seconds=averaged.timings.read_seconds,
            arithmetic_seconds=averaged.timings.arithmetic_seconds,
            write_seconds=averaged.timings.write_seconds,
            publish_seconds=publish_seconds,
        ),
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(workspace.device),
        notes=notes,
    )


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
    distributed: bool = False,
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
        distributed: Likewise.
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
        distributed=distributed,
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


@dataclass(frozen=True, kw_only=True)
class _Averaged:
    """What all processes together found and took."""

    differing: list[list[str]]  # for each output, in its order
    timings: Timings


def _prepare_together(
    processes: Processes,
    stack: ExitStack,
    sources: Source | Sequence[Source],
    output: Path,
    recipe: Recipe,
    **options: Any,
) -> Prepared:
    """Make the plan in every process, and see that it is the same in all."""
    prepared: list[Prepared] = []

    def prepare() -> str:
        entered = prepared_average(sources, output, recipe, processes=processes, **options)
        prepared.append(stack.enter_context(entered))
        return prepared[0].plan.fingerprint

    if len(set(processes.together(prepare))) > 1:
        raise ProcessError(
            "the processes see different checkpoints or options: all must see the same files"
        )
    return prepared[0]


def _enter_together(
    processes: Processes, stack: ExitStack, directory: OutputDirectory
) -> list[int]:
    """Make the output directory, then enter it everywhere; return the blocks done before."""

    def enter(rank_is_due: bool) -> list[int]:
        if rank_is_due:
            stack.enter_context(directory)
        return list(directory.finished)

    before = processes.together(lambda: enter(processes.rank == 0))[0]
    processes.together(lambda: enter(processes.rank != 0))
    return before


def _average_together(
    processes: Processes,
    prepared: Prepared,
    directory: OutputDirectory,
    before: Sequence[int],
    progress: Progress | None,
) -> _Averaged:
    """Average what is left to do, each process its share; see that nothing changed meanwhile."""
    plan = prepared.plan
    blocks = processes.share(sorted(set(range(len(plan.blocks))) - set(before)))
    report = _stage(progress, "average", plan.read_nbytes_of(blocks))

    def advance(done: int) -> None:
        report(done)
        processes.look_out()

    def work() -> list[Any]:
        timings = average(
            Job(
                plan=plan,
                checkpoints=prepared.checkpoints,
                sinks=directory.models,
                blocks=blocks,
                finished=directory.finish_block,
                progress=advance,
            ),
            prepared.workspace,
        )
        for checkpoint in prepared.checkpoints:
            checkpoint.check_unchanged()
        if processes.size > processes.local_size:  # what other hosts wrote must reach the storage
            directory.sync()
        found = sorted(set().union(*directory.finished.values()))
        return [found, [timings.read_seconds, timings.arithmetic_seconds, timings.write_seconds]]

    timings, found = Timings(), set[tuple[int, str]]()
    for differing, seconds in processes.together(work):
        timings.add(Timings(*seconds), share=1 / processes.size)
        found.update((row, name) for row, name in differing)
    return _Averaged(
        differing=[
            [tensor.name for tensor in plan.tensors if (row, tensor.name) in found]
            for row in range(len(plan.outputs))
        ],
        timings=timings,
    )


def _recompute_bn(
    processes: Processes,
    prepared: Prepared,
    directory: OutputDirectory,
    batchnorm: BnPass | None,
    progress: Progress | None,
) -> list[BnOutcome | None]:
    """Run the BatchNorm pass on every output, then put the statistics into the written files."""
    run = prepared.run_bn_pass
    if batchnorm is None or run is None:
        return [None] * len(directory.models)

    def report(stage: str) -> Callable[[int], None]:
        return _stage(progress, stage, batchnorm.max_samples)

    def add_indexes() -> None:
        for model in directory.models:
            model.add_index()

    processes.first(add_indexes)
    outcomes = [
        run(number, model.directory, str(directory.output), report)
        for number, model in enumerate(directory.models)
    ]

    def patch() -> None:
        directory.end_journal()
        for model, outcome in zip(directory.models, outcomes, strict=True):
            for name, data in outcome.statistics:
                model.patch(name, data)

    processes.first(patch)
    return [*outcomes]


def _finish(
    prepared: Prepared,
    directory: OutputDirectory,
    differing: Sequence[Sequence[str]],
    notes: Sequence[str],
    outcomes: Sequence[BnOutcome | None],
) -> None:
    """Add what belongs beside the weights, and publish."""
    plan = prepared.plan
    derived_from = [earlier_provenance(one) for one in prepared.checkpoints]
    for index, (one, model) in enumerate(zip(plan.outputs, directory.models, strict=True)):
        outcome, files = outcomes[index], prepared.side_files[index]
        model.add_index()
        copy_side_files(files, model, output_dtype=plan.changed_dtype)
        model.add_file(
            PROVENANCE_NAME,
            provenance(
                plan,
                one,
                version=__version__,
                device=prepared.workspace.device,
                differing=differing[index],
                notes=notes,
                side_files=[file.name for file in files],
                derived_from=derived_from,
                batchnorm=None if outcome is None else asdict(outcome.report),
                metrics=None if outcome is None else outcome.metrics,
                comparison=() if outcome is None else [asdict(row) for row in outcome.comparison],
            ),
        )
    directory.publish()


def _outcome(outcome: BnOutcome | None) -> dict[str, Any]:
    """Return what a result tells of the BatchNorm pass."""
    if outcome is None:
        return {"batchnorm": None}
    return {
        "batchnorm": outcome.report,
        "metrics": outcome.metrics,
        "comparison": outcome.comparison,
    }


def _report_notes(report: BnReport) -> list[str]:
    notes = [f"BatchNorm layer '{name}' {why}" for name, why in report.skipped.items()]
    notes += [f"BatchNorm pass: {note}" for note in report.notes]
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
