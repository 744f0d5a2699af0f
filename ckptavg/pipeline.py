"""The whole tool on one screen: one function a command.

sources -> checkpoints (headers only) -> plan -> average -> writer -> [BatchNorm pass] -> publish

``ckptavg.verify`` stands beside it: it looks at what was published. ``ckptavg.search`` stands above
it: many averages, judged by the user's metric (``sweep``, ``soup``, ``tune``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ckptavg._version import __version__
from ckptavg.average import DEFAULT_MEMORY_BUDGET_BYTES
from ckptavg.comparing import compared_along, trajectory_notes
from ckptavg.cycles import Recorded
from ckptavg.errors import UsageError, told_storage_errors
from ckptavg.gathering import find_run_of, open_source
from ckptavg.hub import natural_order
from ckptavg.inspecting import checkpoint_info, run_info
from ckptavg.metrics import Mode
from ckptavg.output import OutputDirectory
from ckptavg.plan import AveragePlan
from ckptavg.prepare import chosen_schemes
from ckptavg.processes import joined_processes
from ckptavg.provenance import weight_file_metadata
from ckptavg.publishing import push_written
from ckptavg.recipe import Accumulate, Buffers, OutputDType, Recipe
from ckptavg.results import (
    AverageResult,
    BnPass,
    CheckpointInfo,
    Progress,
    RunInfo,
)
from ckptavg.schemes import Scheme
from ckptavg.selection import Selection
from ckptavg.sources import HubAccess, SingleCheckpoint, Source, expand_sources
from ckptavg.steps import (
    Clock,
    average_together,
    complete_all,
    enter_together,
    evaluate_by_command,
    finish,
    outcome_notes,
    prepare_together,
    recompute_statistics,
    result_of,
)
from ckptavg.tensors import HubRevision, OutputFormat, PushResult


@told_storage_errors()
def average_checkpoints(
    sources: Source | Sequence[Source],
    output: str | Path,
    *,
    last: int | None = None,
    first: int | None = None,
    every: int | None = None,
    steps: tuple[int | None, int | None] | None = None,
    match: str | Sequence[str] = (),
    at_lr_minima: bool = False,
    constant_lr: bool = False,
    swad: bool = False,
    swad_tolerance: float | None = None,
    best: int | None = None,
    metric: str | None = None,
    mode: Mode | None = None,
    log: str | Path | None = None,
    lr_recorded: Recorded | None = None,
    schemes: str | Scheme | Sequence[str | Scheme] = (),
    coefficients: Sequence[float] | None = None,
    accumulate: Accumulate = "auto",
    dtype: OutputDType = "same",
    buffers: Buffers = "last",
    allow_nonfinite: bool = False,
    adapter_rank: int | None = None,
    adapter_factors: bool = False,
    state_key: str | None = None,
    strip_prefixes: Sequence[str] = (),
    keep_prefix: bool = False,
    batchnorm: BnPass | None = None,
    device: str = "auto",
    memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
    n_threads: int | None = None,
    max_shard_bytes: int | None = None,
    output_format: OutputFormat = "safetensors",
    overwrite: bool = False,
    include_code: bool = True,
    cache: bool = False,
    checksum: bool = False,
    check_trajectory: bool = False,
    distributed: bool = False,
    planned: Callable[[AveragePlan], None] | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> AverageResult:
    """Average saved checkpoints into one model directory, or several at once.

    With ``batchnorm``, the averaged model's BatchNorm statistics are recomputed before anything is
    published. The output appears complete or not at all. A run that was interrupted (not one that
    failed) is continued when it is called again with the same inputs and options.

    Args:
        sources: Checkpoint files and directories, run directories, globs, ``{a..b..step}`` and
            ``{a,b}`` patterns, and revisions on the Hub such as ``org/name@step*`` (see
            ``expand_sources``). They are ordered by training step (or epoch) where all tell
            theirs, else as given.
        output: The model directory to make; with several schemes the directory of one model
            directory each.
        last: Of all these, take the newest so many; see ``Selection``.
        first: Take the oldest so many.
        every: Take every so-manyth, counted back from the newest.
        steps: Take those of these training steps, both ends included; None leaves an end open.
        match: Take those whose names match one of these patterns, such as ``checkpoint-*``.
        at_lr_minima: Take those at the minimum of each cycle of the learning rate; see
            ``Selection``, as for all that follow up to ``lr_recorded``.
        constant_lr: Take the last stretch of those trained at one learning rate.
        swad: Take those in SWAD's window of a validation loss.
        swad_tolerance: By what part losses may exceed those at its beginning; None is 0.3.
        best: Take so many with the best ``metric`` on record.
        metric: What ``best`` and ``swad`` go by.
        mode: Whether less (``min``) or more of it is better; None goes by its name.
        log: File that tells learning rates and metrics; None is what the checkpoints tell.
        lr_recorded: Whether rates on record are those ``used`` for a checkpoint, or of the
            ``next`` update; None finds out.
        schemes: What to average, such as ``uniform:last=5``; see ``parse_schemes``, ``Scheme``.
            One pass over the checkpoints makes all averages. None given is the uniform mean.
        coefficients: Short for one scheme: one multiplier a checkpoint, in the order of the
            sources.
        accumulate: dtype of the sums; see ``Recipe``.
        dtype: dtype of averaged tensors in the output; ``same`` keeps the inputs'.
        buffers: Which checkpoint gives integer and bool tensors that differ.
        allow_nonfinite: Keep infinity and NaN instead of refusing them.
        adapter_rank: Rank of averaged LoRA adapters; None is the exact mean, at the sum of ranks.
        adapter_factors: Average the parameters of adapters as they are; see ``Recipe``.
        state_key: The entry of torch files that holds the weights, such as ``ema``.
        strip_prefixes: Prefixes to remove from tensor names.
        keep_prefix: Compare names without prefixes, but write those of the last checkpoint.
        batchnorm: Model, data and evaluation: the BatchNorm pass, and what judges the result.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
        memory_budget_bytes: Upper bound for the buffers in host memory, of each process.
        n_threads: Threads that read; None chooses by the machine.
        max_shard_bytes: Upper bound for an output file, unless one tensor is larger; None is 5 GB.
            Not for torch files, which are never split.
        output_format: ``safetensors``, or ``torch`` for one file ``model.pt``, as torch.save
            writes a state dict.
        overwrite: Replace an existing output, in one step at the end.
        cache: Keep what comes from the Hub in the cache of huggingface_hub; else the bytes are
            streamed and stored nowhere.
        checksum: Hash local files while they are averaged (SHA-256), compare zip members with
            their CRC-32, and record the hashes, which ``verify_output`` looks at again. What comes
            from the Hub always is.
        include_code: Copy ``*.py`` files of the model directory; they are never run.
        check_trajectory: Compare the checkpoints with each other along the way, from the same read,
            and say whether they are one trajectory; see ``trajectory``.
        distributed: Share the work with the other processes that torchrun started; all of them
            call this with the same arguments, and see the same file system.
        planned: Called with the plan once everything is decided, before any tensor is read.
        progress: Called as work gets done: stage (``average`` in bytes, ``batchnorm`` in samples),
            amount since the last call, total if known.
        command: What to record as the command that made the output; tokens are blanked out.

    Raises:
        CkptavgError: One of its subclasses; see ``ckptavg.errors``. Nothing is published then,
            except with AfterPublishError.
    """
    started = time.perf_counter()
    output = Path(output)
    selection = Selection(
        last=last,
        first=first,
        every=every,
        steps=steps,
        match=(match,) if isinstance(match, str) else tuple(match),
        at_lr_minima=at_lr_minima,
        constant_lr=constant_lr,
        swad=swad,
        swad_tolerance=swad_tolerance,
        best=best,
        metric=metric,
        mode=mode,
        log=log,
        lr_recorded=lr_recorded,
    )
    recipe = Recipe(
        schemes=chosen_schemes(schemes, coefficients),
        accumulate=accumulate,
        dtype=dtype,
        buffers=buffers,
        allow_nonfinite=allow_nonfinite,
        adapter_rank=adapter_rank,
        adapter_factors=adapter_factors,
    )
    with joined_processes(distributed=distributed) as processes, ExitStack() as stack:
        prepared = prepare_together(
            processes, stack, sources, output, recipe,
            selection=selection,
            state_key=state_key,
            strip_prefixes=strip_prefixes,
            keep_prefix=keep_prefix,
            device=device,
            memory_budget_bytes=memory_budget_bytes,
            n_threads=n_threads,
            max_shard_bytes=max_shard_bytes,
            output_format=output_format,
            overwrite=overwrite,
            include_code=include_code,
            batchnorm=batchnorm,
            cache=cache,
            checksum=checksum,
            compare=check_trajectory,
        )  # fmt: skip
        plan = prepared.plan
        if planned is not None:
            planned(plan)
        directory = OutputDirectory(
            output,
            plan,
            metadata=[weight_file_metadata(plan, one, __version__) for one in plan.outputs],
            overwrite=overwrite,
            rank=processes.rank,
            hash_along=batchnorm is None,  # which changes what was written
        )
        before = enter_together(processes, stack, directory)
        averaging = time.perf_counter()
        averaged = average_together(processes, prepared, directory, before, progress)
        average_seconds = time.perf_counter() - averaging
        compared = compared_along(averaged.gram, plan, prepared.workspace.device, average_seconds)
        outcomes = recompute_statistics(processes, prepared, directory, batchnorm, progress)
        notes = (
            *plan.notes, *prepared.notes, *directory.notes, *averaged.notes,
            *trajectory_notes(compared, before), *outcome_notes(outcomes),
        )  # fmt: skip
        processes.first(lambda: complete_all(prepared, directory))
        outcomes = evaluate_by_command(processes, batchnorm, directory, outcomes)
        publishing = time.perf_counter()
        processes.first(
            lambda: finish(prepared, directory, averaged, list(notes), outcomes, command)
        )
        publish_seconds = time.perf_counter() - publishing
    result = result_of(
        processes, prepared, averaged, outcomes, output,
        before=before,
        clock=Clock(
            started=started, average_seconds=average_seconds, publish_seconds=publish_seconds
        ),
        notes=notes,
    )  # fmt: skip
    return result if compared is None else replace(result, trajectory=compared.result())


@told_storage_errors()
def recompute_bn(
    source: Source,
    output: str | Path,
    batchnorm: BnPass,
    *,
    state_key: str | None = None,
    strip_prefixes: Sequence[str] = (),
    keep_prefix: bool = False,
    device: str = "auto",
    memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
    n_threads: int | None = None,
    max_shard_bytes: int | None = None,
    output_format: OutputFormat = "safetensors",
    overwrite: bool = False,
    include_code: bool = True,
    cache: bool = False,
    checksum: bool = False,
    distributed: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> AverageResult:
    """Recompute the BatchNorm statistics of one saved model; everything else stays bit for bit.

    Args:
        source: A checkpoint file or model directory.
        output: The model directory to make.
        batchnorm: Model and data.
        state_key: As in ``average_checkpoints``, like all that follow.
        strip_prefixes: Likewise.
        keep_prefix: Likewise.
        device: Likewise.
        memory_budget_bytes: Likewise.
        n_threads: Likewise.
        max_shard_bytes: Likewise.
        output_format: Likewise.
        overwrite: Likewise.
        include_code: Likewise.
        cache: Likewise.
        checksum: Likewise.
        distributed: Likewise.
        progress: Likewise.
        command: Likewise.

    Raises:
        UsageError: If the source is a pattern that names several checkpoints.
        CkptavgError: As ``average_checkpoints`` does.
    """
    hub = HubAccess()
    found = expand_sources(source, hub)
    if len(found) != 1:
        raise UsageError(f"{source}: names {len(found)} checkpoints, expected one model")
    run = find_run_of(found[0], hub)
    if run is not None and not run.has_weights and len(run.names) > 1:
        raise UsageError(
            f"{source}: is a run of {len(run.names)} checkpoints; name one of them, or average "
            "them with --model and --data"
        )
    # the average of one checkpoint is that checkpoint
    return average_checkpoints(
        [SingleCheckpoint(one) if isinstance(one, str) else one for one in found],
        output,
        allow_nonfinite=True,
        batchnorm=batchnorm,
        state_key=state_key,
        strip_prefixes=strip_prefixes,
        keep_prefix=keep_prefix,
        device=device,
        memory_budget_bytes=memory_budget_bytes,
        n_threads=n_threads,
        max_shard_bytes=max_shard_bytes,
        output_format=output_format,
        overwrite=overwrite,
        include_code=include_code,
        cache=cache,
        checksum=checksum,
        distributed=distributed,
        progress=progress,
        command=command,
    )


@told_storage_errors()
def push_model(
    directory: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    message: str | None = None,
    card_text: str | None = None,
) -> PushResult:
    """Publish a model that ckptavg made on the Hub, with a model card, in one commit.

    Pushing the same again makes no commit; pushing again after a failure sends what is missing.
    A README.md in the directory is published as it is, with ``card_text`` at its end; else one is
    made from the provenance.

    Args:
        directory: A model directory that ckptavg wrote.
        repo: ``org/name``; made if it does not exist.
        revision: Branch, made from main if it does not exist; None is main.
        private: Whether a repository that is made now is private.
        create_pr: Open a pull request instead of writing to the branch.
        message: First line of the commit's message.
        card_text: Markdown that the card ends with.

    Raises:
        UsageError: If the directory is not such a model, or there is no token.
        SourceError: If the Hub denies access.
        HubError: If the Hub cannot be reached, or refuses.
    """
    return push_written(
        Path(directory),
        repo,
        revision=revision,
        private=private,
        create_pr=create_pr,
        message=message,
        card_text=card_text,
    )


@told_storage_errors()
def inspect_checkpoint(source: Source, *, state_key: str | None = None) -> CheckpointInfo:
    """Read the headers of one checkpoint, local or on the Hub, whatever else lies beside it.

    Raises:
        SourceError: If it is not there.
        CheckpointError: If it cannot be read.
        HubError: If the Hub cannot be reached.
    """
    hub = HubAccess()
    checkpoint = open_source(source, state_key=state_key, hub=hub)
    try:
        return checkpoint_info(checkpoint)
    finally:
        hub.cancel()
        checkpoint.close()


@told_storage_errors()
def inspect_run(
    source: Source, *, state_key: str | None = None, selection: Selection | None = None
) -> RunInfo | None:
    """List the checkpoints in a run directory, local or on the Hub, from their headers.

    Returns:
        None if the source is a checkpoint, or holds none.

    Raises:
        SourceError: If it is not there, or the selection leaves nothing.
        CheckpointError: If it cannot be looked at.
        HubError: If the Hub cannot be reached.
    """
    hub = HubAccess()
    try:
        return run_info(source, hub, state_key=state_key, selection=selection or Selection())
    finally:
        hub.cancel()


@told_storage_errors()
def hub_revisions(repo: str) -> list[HubRevision]:
    """List the branches and tags of a repository on the Hub, in the order of the numbers in them.

    Args:
        repo: ``org/name``.

    Raises:
        SourceError: If there is no such repository, or it may not be seen.
        HubError: If the Hub cannot be reached.
    """
    revisions = HubAccess().connection.repository(repo).revisions
    return [
        HubRevision(repo, name, revisions[name]) for name in sorted(revisions, key=natural_order)
    ]
