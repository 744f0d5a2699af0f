"""The steps of a run, each taken by all processes together; ``pipeline`` is their order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ckptavg._version import __version__
from ckptavg.average import Job, Timings, average
from ckptavg.checkpoint import ADAPTER_CONFIG_NAME
from ckptavg.checkpoint.digests import FileDigest
from ckptavg.checkpoint.folder import PROVENANCE_NAME
from ckptavg.derive import derive
from ckptavg.derived import AdapterReport, Deviation, adapter_report, report_note
from ckptavg.errors import ProcessError
from ckptavg.eval_command import EvalCommand
from ckptavg.geometry import GramTable
from ckptavg.input_hashes import InputHashes
from ckptavg.memory import peak_device_bytes, peak_host_bytes
from ckptavg.output import OutputDirectory
from ckptavg.plan import gram_table
from ckptavg.prepare import Prepared, prepared_average
from ckptavg.processes import Processes
from ckptavg.provenance import provenance
from ckptavg.recipe import Recipe
from ckptavg.recorded_recipe import recorded_recipe
from ckptavg.results import AverageResult, BnPass, OutputResult, Progress, StageTimes
from ckptavg.side_files import copy_side_files
from ckptavg.sources import Source

if TYPE_CHECKING:
    from ckptavg.batchnorm import BnReport
    from ckptavg.bn_pass import BnOutcome

_FEW_SAMPLES_A_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Averaged:
    """What all processes together found and took."""

    differing: list[list[str]]  # for each output, in its order
    adapters: list[AdapterReport | None]  # likewise
    timings: Timings
    gram: GramTable | None = None  # inner products, where the plan compares checkpoints
    digests: Mapping[str, str] = field(default_factory=dict)  # of local inputs, by path

    @property
    def notes(self) -> list[str]:
        """What was measured, one sentence each."""
        found = (None if one is None else report_note(one) for one in self.adapters)
        return list(dict.fromkeys(note for note in found if note is not None))


def prepare_together(
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


def enter_together(processes: Processes, stack: ExitStack, directory: OutputDirectory) -> list[int]:
    """Make the output directory, then enter it everywhere; return the blocks done before."""

    def enter(rank_is_due: bool) -> list[int]:
        if rank_is_due:
            stack.enter_context(directory)
        return list(directory.finished)

    before = processes.together(lambda: enter(processes.rank == 0))[0]
    processes.together(lambda: enter(processes.rank != 0))
    return before


def average_together(
    processes: Processes,
    prepared: Prepared,
    directory: OutputDirectory,
    before: Sequence[int],
    progress: Progress | None,
) -> Averaged:
    """Average what is left to do, each process its share; see that nothing changed meanwhile."""
    plan = prepared.plan
    blocks = processes.share(sorted(set(range(len(plan.blocks))) - set(before)))
    derived_nbytes = plan.derived_read_nbytes if processes.rank == 0 else 0
    report = stage_of(progress, "average", plan.read_nbytes_of(blocks) + derived_nbytes)
    gram = gram_table(plan)

    hashes = InputHashes(_digests(processes, prepared))
    total = max(plan.read_nbytes_of(blocks) + derived_nbytes, 1)
    n_done = 0

    def advance(done: int) -> None:
        nonlocal n_done
        n_done += done
        hashes.follow(min(n_done / total, 1.0))
        report(done)
        processes.look_out()

    def work() -> list[Any]:
        with hashes:
            return averaged_and_checked()

    def averaged_and_checked() -> list[Any]:
        timings = average(
            Job(
                plan=plan,
                checkpoints=prepared.checkpoints,
                sinks=directory.models,
                blocks=blocks,
                finished=directory.finish_block,
                progress=advance,
                gram=gram,
            ),
            prepared.workspace,
        )
        deviations: list[list[Deviation]] = []
        if processes.rank == 0:
            started = time.perf_counter()
            deviations = derive(plan, prepared.checkpoints, directory.models, advance)
            timings.arithmetic_seconds += time.perf_counter() - started
        digests = hashes.finish()
        for checkpoint in prepared.checkpoints:
            checkpoint.check_unchanged()
        for index in plan.used_checkpoints:  # in every process: what it read is what it verifies
            prepared.checkpoints[index].verify()
        if processes.size > processes.local_size:  # what other hosts wrote must reach the storage
            directory.sync()
        found = sorted(set().union(*directory.finished.values()))
        seconds = [timings.read_seconds, timings.arithmetic_seconds, timings.write_seconds]
        return [found, seconds, deviations, None if gram is None else gram.to_words(), digests]

    timings, found = Timings(), set[tuple[int, str]]()
    done = processes.together(work)
    together = gram_table(plan)
    digests: dict[str, str] = {}
    for differing, seconds, _, products, hashed in done:
        digests |= hashed
        if together is not None:
            together.add_words(products)
        timings.add(Timings(*seconds), share=1 / processes.size)
        found.update((row, name) for row, name in differing)
    adapter = plan.derived.adapter
    return Averaged(
        adapters=[
            None if adapter is None else adapter_report(adapter.method, adapter.rank, deviations)
            for deviations in done[0][2]
        ],
        differing=[
            [tensor.name for tensor in plan.tensors if (row, tensor.name) in found]
            for row in range(len(plan.outputs))
        ],
        timings=timings,
        gram=together,
        digests=digests,
    )


def _digests(processes: Processes, prepared: Prepared) -> list[FileDigest]:
    """Return what hashes this process's share of the files that are averaged."""
    found = [
        one
        for index in prepared.plan.used_checkpoints
        for one in prepared.checkpoints[index].digests(all_files=prepared.checksum)
    ]
    by_path = {one.file.path: one for one in found}  # a file may hold several checkpoints
    return [*by_path.values()][processes.rank :: processes.size]


def recompute_statistics(
    processes: Processes,
    prepared: Prepared,
    directory: OutputDirectory,
    batchnorm: BnPass | None,
    progress: Progress | None,
) -> list[BnOutcome | None]:
    """Judge every output with the user's model, then put new statistics into the written files."""
    run = prepared.run_bn_pass
    if batchnorm is None or run is None:
        return [None] * len(directory.models)

    def report(stage: str) -> Callable[[int], None]:
        return stage_of(progress, stage, batchnorm.max_samples)

    processes.first(lambda: add_indexes(directory))
    outcomes = [
        run(number, model.directory, str(directory.output), report)
        for number, model in enumerate(directory.models)
    ]

    processes.first(lambda: put_statistics(directory, outcomes))
    return [*outcomes]


def put_statistics(directory: OutputDirectory, outcomes: Sequence[BnOutcome | None]) -> None:
    """Put new BatchNorm statistics into the written files of every output that has some."""
    statistics = [[] if outcome is None else outcome.statistics for outcome in outcomes]
    if any(statistics):
        directory.end_journal()
    for model, fresh in zip(directory.models, statistics, strict=True):
        for name, data in fresh:
            model.patch(name, data)


def add_indexes(directory: OutputDirectory) -> None:
    """Make every output one that can be opened."""
    for model in directory.models:
        model.add_index()


def complete(prepared: Prepared, directory: OutputDirectory, index: int) -> None:
    """Make one output a model directory that loads: all but the provenance is in it."""
    plan, model = prepared.plan, directory.models[index]
    model.seal(prepared.workspace.n_threads)
    model.add_index()
    adapter, rewritten = plan.derived.adapter, dict[str, bytes]()
    if adapter is not None:
        rewritten[ADAPTER_CONFIG_NAME] = adapter.configs[index].encode()
    files = prepared.side_files[index]
    copy_side_files(files, model, output_dtype=plan.changed_dtype, rewritten=rewritten)


def complete_all(prepared: Prepared, directory: OutputDirectory) -> None:
    """Complete every output."""
    for index in range(len(directory.models)):
        complete(prepared, directory, index)


def evaluate_by_command(
    processes: Processes,
    batchnorm: BnPass | None,
    directory: OutputDirectory,
    outcomes: Sequence[BnOutcome | None],
) -> list[BnOutcome | None]:
    """Let the user's command judge every output, if there is one; all are complete."""
    command = None if batchnorm is None else batchnorm.evaluate
    if not isinstance(command, EvalCommand):
        return [*outcomes]
    from ckptavg.bn_pass import BnOutcome

    def judge() -> list[dict[str, float]]:
        if processes.rank != 0:
            return []
        return [command.evaluated(model.directory) for model in directory.models]

    return [
        replace(outcome or BnOutcome(statistics=[], metrics=None), metrics=metrics)
        for outcome, metrics in zip(outcomes, processes.together(judge)[0], strict=True)
    ]


def finish(
    prepared: Prepared,
    directory: OutputDirectory,
    averaged: Averaged,
    notes: Sequence[str],
    outcomes: Sequence[BnOutcome | None],
    command: str | None,
    evidence: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Add the provenance to outputs that are complete, and publish.

    ``evidence`` are files that go into every output, by name.
    """
    plan = prepared.plan
    for model in directory.models:
        for name, content in evidence.items():
            model.add_file(name, content)
    hashes = directory.sync_and_hash(prepared.workspace.n_threads)
    for index, (one, model) in enumerate(zip(plan.outputs, directory.models, strict=True)):
        outcome, files = outcomes[index], prepared.side_files[index]
        report = averaged.adapters[index]
        bn_report = None if outcome is None else outcome.report
        model.add_file(
            PROVENANCE_NAME,
            provenance(
                plan,
                one,
                version=__version__,
                device=prepared.workspace.device,
                state_key=prepared.state_key,
                strip_prefixes=prepared.strip_prefixes,
                keep_prefix=prepared.keep_prefix,
                differing=averaged.differing[index],
                adapter=None if report is None else asdict(report),
                notes=notes,
                side_files=[*(file.name for file in files), *evidence],
                evidence=list(evidence),
                hashes=hashes[index],
                digests=averaged.digests,
                reproduce=recorded_recipe(plan, one, prepared.asked, directory.output / one.name),
                derived_from=prepared.derived_from,
                batchnorm=None if bn_report is None else asdict(bn_report),
                metrics=None if outcome is None else outcome.metrics,
                command=command,
                inherited_card=prepared.inherited_cards[index],
                comparison=() if outcome is None else [asdict(row) for row in outcome.comparison],
            ),
        )
    directory.publish()


@dataclass(frozen=True, kw_only=True)
class Clock:
    """What a run measured of its own time, in seconds."""

    started: float
    average_seconds: float
    publish_seconds: float


def result_of(
    processes: Processes,
    prepared: Prepared,
    averaged: Averaged,
    outcomes: Sequence[BnOutcome | None],
    output: Path,
    *,
    before: Sequence[int],
    clock: Clock,
    notes: Sequence[str],
) -> AverageResult:
    """Return what a run did, once it is published."""
    plan, workspace = prepared.plan, prepared.workspace
    return AverageResult(
        output=output,
        outputs=tuple(
            OutputResult(
                path=output / one.name,
                scheme=str(one.scheme),
                coefficients=one.row.told_coefficients,
                statistic=one.row.statistic_name,
                differing=tuple(averaged.differing[index]),
                taken_from=plan.labels[one.take_from],
                adapter=averaged.adapters[index],
                **outcome_fields(outcomes[index]),
            )
            for index, one in enumerate(plan.outputs)
        ),
        n_checkpoints=plan.n_checkpoints,
        n_processes=processes.size,
        device=workspace.device,
        read_nbytes=plan.read_nbytes,
        written_nbytes=plan.write_nbytes,
        resumed_nbytes=plan.read_nbytes_of(before),
        seconds=time.perf_counter() - clock.started,
        average_seconds=clock.average_seconds,
        hub_nbytes=prepared.hub.fetched_nbytes,
        times=StageTimes(
            read_seconds=averaged.timings.read_seconds,
            arithmetic_seconds=averaged.timings.arithmetic_seconds,
            write_seconds=averaged.timings.write_seconds,
            publish_seconds=clock.publish_seconds,
        ),
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(workspace.device),
        notes=tuple(notes),
    )


def outcome_fields(outcome: BnOutcome | None) -> dict[str, Any]:
    """Return what a result tells of the BatchNorm pass."""
    if outcome is None:
        return {"batchnorm": None}
    return {
        "batchnorm": outcome.report,
        "metrics": outcome.metrics,
        "comparison": outcome.comparison,
    }


def outcome_notes(outcomes: Sequence[BnOutcome | None]) -> list[str]:
    """Return what a user should know about the BatchNorm passes of a run."""
    reports = [one.report for one in outcomes if one is not None]
    return [note for report in reports if report is not None for note in _report_notes(report)]


def _report_notes(report: BnReport) -> list[str]:
    notes = [f"BatchNorm layer '{name}' {why}" for name, why in report.skipped.items()]
    notes += [f"BatchNorm pass: {note}" for note in report.notes]
    if not report.layers and not report.skipped:
        notes.append("the model has no BatchNorm layers: no BN pass was needed")
    if report.layers and 0 < report.n_samples < _FEW_SAMPLES_A_BATCH * report.n_batches:
        notes.append(
            f"BatchNorm statistics come from batches of about "
            f"{max(report.n_samples // report.n_batches, 1)} samples; batches of 128 or more are "
            "closer to what the model will meet"
        )
    return notes


def stage_of(progress: Progress | None, stage: str, total: int | None) -> Callable[[int], None]:
    """Return what reports that so much more of a stage is done."""
    if progress is None:
        return lambda done: None
    return lambda done: progress(stage, done, total)
