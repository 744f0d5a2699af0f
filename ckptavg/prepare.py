"""Everything decided, nothing read: what comes before the work, and what ``--dry-run`` shows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptavg.average import (
    DEFAULT_MEMORY_BUDGET_BYTES,
    Workspace,
    averaging_device,
    choose_device,
    size_workspace,
)
from ckptavg.checkpoint import Checkpoint, normalise_names, widen_dtypes
from ckptavg.derive import refuse_too_large
from ckptavg.destination import check_destination
from ckptavg.errors import MemoryBudgetError, SourceError, UsageError
from ckptavg.gathering import open_source
from ckptavg.input_hashes import HASHING_NBYTES
from ckptavg.memory import BLAS_NBYTES, check_room
from ckptavg.opening import fetched_notes, opened_in_order, telling_what_was_fetched
from ckptavg.plan import AveragePlan, check_format, plan_average
from ckptavg.processes import Processes
from ckptavg.provenance import earlier_provenance, last_averaged
from ckptavg.recipe import Recipe
from ckptavg.recorded_recipe import Asked, command_for
from ckptavg.results import BnPass
from ckptavg.schemes import Scheme, parse_schemes
from ckptavg.selection import Selection
from ckptavg.side_files import SideFile, find_side_files, inherited_front_matter
from ckptavg.sources import HubAccess, Source
from ckptavg.tensors import HubRevision, OutputFormat

if TYPE_CHECKING:
    from ckptavg.bn_pass import BnOutcome, LastCheckpoint
    from ckptavg.live_model import LiveModel

    # number and directory of an output, what messages call it, progress of a stage -> outcome
    RunBnPass = Callable[[int, Path, str, Callable[[str], Callable[[int], None]]], BnOutcome]


_OTHER_THREADS = 4  # that write back, hash and watch
_MAX_READ_AHEAD_BYTES = 192 * 2**20  # what is fetched before it is needed
# what asks for bytes in order keeps up with any network: one thread that adds, or one a file that
# feeds a GPU
_MAX_STREAM_READERS = 8


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything decided, nothing read: what ``--dry-run`` shows.

    ``live`` is the user's model, where there is one, and ``run_bn_pass`` what judges an average
    with it. ``side_files`` and ``inherited_cards`` have one for each output of the plan,
    ``derived_from`` for each checkpoint.
    """

    checkpoints: Sequence[Checkpoint]
    plan: AveragePlan
    workspace: Workspace
    side_files: Sequence[Sequence[SideFile]]
    live: LiveModel | None
    run_bn_pass: RunBnPass | None
    hub: HubAccess
    derived_from: Sequence[Mapping[str, Any] | None]
    inherited_cards: Sequence[str | None]
    state_key: str | None
    strip_prefixes: tuple[str, ...]
    keep_prefix: bool
    asked: Asked
    checksum: bool
    notes: tuple[str, ...]


def chosen_schemes(
    schemes: str | Scheme | Sequence[str | Scheme], coefficients: Sequence[float] | None
) -> tuple[Scheme, ...]:
    """Return the schemes that the arguments ask for, the uniform mean if none."""
    given = [schemes] if isinstance(schemes, (str, Scheme)) else list(schemes)
    if coefficients is not None:
        if given:
            raise UsageError("coefficients are a scheme of their own: pass coefficients or schemes")
        given = [Scheme(name="coefficients", coefficients=tuple(coefficients))]
    parsed: list[Scheme] = []
    for one in given:
        parsed += [one] if isinstance(one, Scheme) else parse_schemes(one)
    return tuple(parsed) or (Scheme(),)


@contextmanager
def prepared_average(
    sources: Source | Sequence[Source],
    output: str | Path,
    recipe: Recipe,
    *,
    selection: Selection | None = None,
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
    batchnorm: BnPass | None = None,
    cache: bool = False,
    checksum: bool = False,
    compare: bool = False,
    processes: Processes | None = None,
) -> Iterator[Prepared]:
    """Open the sources, decide everything from headers, and close them at the end.

    Args as in ``average_checkpoints``; explicit coefficients follow the order of the sources, and
    ``compare`` computes inner products of the checkpoints along.
    """
    processes = processes or Processes()
    for name, value in (
        ("n_threads", n_threads),
        ("memory_budget_bytes", memory_budget_bytes),
        ("max_shard_bytes", max_shard_bytes),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}, expected at least 1")
    check_format(output_format, max_shard_bytes)
    directory = os.path.realpath(os.curdir)
    with opened_in_order(
        sources,
        selection=selection,
        state_key=state_key,
        strip_prefixes=strip_prefixes,
        keep_prefix=keep_prefix,
        n_threads=n_threads,
        cache=cache,
    ) as found:
        hub, notes, checkpoints = found.hub, found.notes, found.checkpoints
        if found.is_reordered:
            recipe = recipe.reordered(found.order)
        if recipe.dtype != "same":  # the output does not depend on what the inputs are
            checkpoints, widening_notes = widen_dtypes(checkpoints)
            notes += widening_notes
        with telling_what_was_fetched(hub):
            plan = plan_average(
                checkpoints,
                recipe,
                max_shard_bytes=max_shard_bytes,
                output_format=output_format,
                notes=notes,
            )
        plan = replace(plan, compares=compare and len(plan.used_checkpoints) > 1)
        runs_model = batchnorm is not None and batchnorm.model is not None
        if runs_model and plan.derived.adapter is not None:
            raise UsageError(
                "the model is a whole one, and these are adapters: leave --model out (an "
                "--eval-command may judge them)"
            )
        chosen = choose_device(
            device,
            read_nbytes=0 if plan.draws_noise else plan.read_nbytes // processes.size,
            runs_model=runs_model,
            local_rank=processes.local_rank,
        )
        workspace = workspace_for(
            plan,
            averaging_device(plan, chosen),
            hub,
            memory_budget_bytes=memory_budget_bytes,
            n_threads=n_threads,
            local_size=processes.local_size,
            hashes=any(one.digests(all_files=checksum) for one in checkpoints),
        )
        n_threads_in_all = workspace.max_threads + workspace.n_threads + _OTHER_THREADS
        blas_nbytes = BLAS_NBYTES * workspace.max_threads if plan.compares else 0
        check_room(workspace.max_host_nbytes + blas_nbytes, n_threads_in_all)
        check_destination(
            Path(output),
            overwrite=overwrite,
            needed_bytes=plan.write_nbytes,
            inputs=[file for files in plan.files for file in files if not file.digest],
            input_directories=[
                str(one.folder.local_directory())
                for one in checkpoints
                if one.folder is not None and one.hub is None
            ],
        )
        derived_from = [earlier_provenance(one) for one in checkpoints]
        side_files, inherited_cards, side_notes = [], [], dict[str, None]()
        for one in plan.outputs:
            folder = checkpoints[one.row.used[-1]].folder
            files, found_notes = find_side_files(
                checkpoints[one.row.used[-1]], include_code=include_code
            )
            side_files.append(files)
            inherited_cards.append(inherited_front_matter(folder))
            side_notes.update(dict.fromkeys(found_notes))
        live, run_bn_pass = _bn_pass(
            batchnorm,
            checkpoints,
            plan,
            chosen,
            processes,
            found.opened,
            hub=hub,
            state_key=state_key,
            strip_prefixes=strip_prefixes,
        )
        yield Prepared(
            checkpoints=checkpoints,
            plan=plan,
            workspace=workspace,
            side_files=side_files,
            live=live,
            run_bn_pass=run_bn_pass,
            state_key=state_key,
            strip_prefixes=tuple(strip_prefixes),
            keep_prefix=keep_prefix,
            asked=Asked(
                command=command_for(sources),
                directory=directory,
                n_processes=processes.size,
                device=workspace.device,
                state_key=state_key,
                strip_prefixes=tuple(strip_prefixes),
                keep_prefix=keep_prefix,
                max_shard_bytes=max_shard_bytes,
                include_code=include_code,
                batchnorm=batchnorm,
            ),
            checksum=checksum,
            hub=hub,
            derived_from=derived_from,
            inherited_cards=inherited_cards,
            notes=(
                *_averages_among(checkpoints, derived_from),
                *side_notes,
                *_batchnorm_due(plan, batchnorm),
                *_averaged_elsewhere(workspace.device, chosen, batchnorm),
                *fetched_notes(hub),
            ),
        )


def workspace_for(
    plan: AveragePlan,
    device: str,
    hub: HubAccess,
    *,
    memory_budget_bytes: int,
    n_threads: int | None,
    local_size: int,
    hashes: bool = False,
) -> Workspace:
    """Share the memory between what is read ahead from the Hub, hashing, and the engine."""
    streamed = [
        max((stamp.size for stamp in plan.files[index] if stamp.digest), default=0)
        for index in plan.used_checkpoints
    ]
    n_streams = sum(map(bool, streamed))
    reading_nbytes = 0
    if n_streams:
        most = min(memory_budget_bytes // 2, _MAX_READ_AHEAD_BYTES)
        reading_nbytes = hub.connection.fit(most, n_streams, max(streamed))
        if n_threads is None:
            n_threads = 1 if device == "cpu" else min(n_streams, _MAX_STREAM_READERS)
    if hashes:
        reading_nbytes += HASHING_NBYTES
    refuse_too_large(plan, memory_budget_bytes, reading_nbytes)
    try:
        workspace = size_workspace(
            plan,
            device,
            memory_budget_bytes=memory_budget_bytes - reading_nbytes,
            n_threads=n_threads,
            local_size=local_size,
        )
    except MemoryBudgetError as error:
        if not n_streams:
            raise
        raise MemoryBudgetError(
            f"a memory budget of {memory_budget_bytes} bytes is too small for {n_streams} "
            "checkpoints that are streamed from the Hub (--memory)"
        ) from error
    return replace(
        workspace,
        host_nbytes=workspace.host_nbytes + reading_nbytes,
        max_host_nbytes=workspace.max_host_nbytes + reading_nbytes,
    )


def _bn_pass(
    batchnorm: BnPass | None,
    checkpoints: Sequence[Checkpoint],
    plan: AveragePlan,
    device: str,
    processes: Processes,
    opened: list[Checkpoint],
    **reading: Any,
) -> tuple[LiveModel | None, RunBnPass | None]:
    """Build the user's model; return it, and what will judge a written average with it."""
    if batchnorm is None or batchnorm.model is None:
        return None, None
    # imported here: importing torch takes longer than averaging most models
    from ckptavg.batchnorm import refuse_together
    from ckptavg.bn_pass import recompute_written
    from ckptavg.live_model import LiveModel, check_repeatable

    refuse_together(batchnorm, processes)
    given = None
    if batchnorm.compare:
        given = _last_checkpoint(batchnorm, checkpoints, opened, **reading)
    live = LiveModel(batchnorm, checkpoints[-1], device, processes)
    lasts: list[Checkpoint | None] = [None] * len(plan.outputs)
    if given is not None:
        live.check(given)
    if batchnorm.compare and (given is not None or plan.n_checkpoints > 1):
        lasts = [given or checkpoints[one.row.used[-1]] for one in plan.outputs]
    compared = {last.label for last in lasts if last is not None}
    check_repeatable(batchnorm, len(lasts) + len(compared))

    known: dict[str, LastCheckpoint] = {}

    def run(
        number: int, written: Path, label: str, progress: Callable[[str], Callable[[int], None]]
    ) -> BnOutcome:
        return recompute_written(live, plan, written, label, lasts[number], known, progress)

    return live, run


def _last_checkpoint(
    batchnorm: BnPass,
    checkpoints: Sequence[Checkpoint],
    opened: list[Checkpoint],
    *,
    hub: HubAccess,
    state_key: str | None,
    strip_prefixes: Sequence[str],
) -> Checkpoint | None:
    """Open what an average is compared with, where that is not among the checkpoints.

    Raises:
        SourceError: If the provenance of a single model names a checkpoint that is not there.
    """
    source = batchnorm.last_checkpoint
    if len(checkpoints) == 1 and (found := last_averaged(earlier_provenance(checkpoints[0]))):
        # the average tells how its checkpoints were read
        strip_prefixes = [*strip_prefixes, *found.strip_prefixes]
        if source is None or not _is_safetensors(source):
            state_key = state_key or found.state_key
        for file in found.files if source is None else ():
            if (reason := _changed(*file)) is not None:
                raise SourceError(
                    f"{checkpoints[0].label}: the last checkpoint that went into it, "
                    f"{found.source}, {reason}; say where it is (--last-checkpoint)"
                )
        source = source or found.source
    if source is None:
        return None
    opened.append(open_source(source, state_key=state_key, hub=hub))
    names = opened[-1].tensors
    there = [one for one in strip_prefixes if any(name.startswith(one) for name in names)]
    return normalise_names(opened[-1:], there)[0][0]


def _is_safetensors(source: Source) -> bool:
    """Tell whether a checkpoint has no entries to choose from."""
    if isinstance(source, HubRevision):
        return not source.path.endswith((".bin", ".pt", ".pth", ".ckpt"))
    path = Path(source)
    return path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors")))


def _changed(path: str, nbytes: int, mtime_ns: int) -> str | None:
    """Tell what is wrong with a file that the provenance names; None if it is as it was."""
    try:
        found = Path(path).stat()
    except OSError:
        return "is not there"
    return None if (found.st_size, found.st_mtime_ns) == (nbytes, mtime_ns) else "has changed"


def _averages_among(
    checkpoints: Sequence[Checkpoint], derived_from: Sequence[Mapping[str, Any] | None]
) -> list[str]:
    """Point out averages that are averaged with others: a pattern may have caught them."""
    return [
        f"{one.label} is an average that ckptavg made of {told['n_sources']} checkpoints, and is "
        "averaged in as it was named"
        for one, told in zip(checkpoints, derived_from, strict=True)
        if len(checkpoints) > 1 and told is not None and told.get("n_sources", 1) != 1
    ]


def _batchnorm_due(plan: AveragePlan, batchnorm: BnPass | None) -> list[str]:
    has_pass = batchnorm is not None and batchnorm.batches is not None
    if has_pass or not plan.batchnorm_names or plan.n_checkpoints == 1:
        return []
    return [
        f"{len(plan.batchnorm_names)} BatchNorm statistics are averaged with the weights; "
        "recompute them on training data: pass --model and --data, or run ckptavg recompute-bn"
    ]


def _averaged_elsewhere(device: str, chosen: str, batchnorm: BnPass | None) -> list[str]:
    if device == chosen:
        return []
    model = f"the model runs on {chosen}" if batchnorm is not None else f"{chosen} is not used"
    return [
        "SWAG samples are drawn on the CPU, so that their bits are the same everywhere, and all is "
        f"averaged there; {model}"
    ]
