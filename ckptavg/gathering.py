"""What was typed -> opened checkpoints: run directories opened out, and a selection taken."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ckptavg.checkpoint import Checkpoint, open_checkpoint, open_hub_checkpoint
from ckptavg.checkpoint.folder import Folder, LocalFolder, read_json
from ckptavg.checkpoint.hub_folder import HubFolder, names_a_file
from ckptavg.checkpoint.position import Position, position_from_name, training_order
from ckptavg.doubts import doubts, duplicates
from ckptavg.errors import CheckpointError, IncompleteCheckpointError, SourceError
from ckptavg.log_selection import LogSelection
from ckptavg.rates import Saved
from ckptavg.runs import Candidate, Run, find_run, in_order, mixture, settle
from ckptavg.selection import Selection
from ckptavg.sources import HubAccess, SingleCheckpoint, Source, expand_sources, hub_reference
from ckptavg.tensors import HubRevision
from ckptavg.training_log import TrainingLog, json_rows, log_of_rows

_TRAINER_STATE = "trainer_state.json"


def open_sources(
    sources: Source | Sequence[Source],
    *,
    state_key: str | None = None,
    hub: HubAccess | None = None,
    selection: Selection | None = None,
) -> tuple[list[Checkpoint], list[str]]:
    """Open what is taken of what the sources stand for, in the order typed.

    A run directory stands for the checkpoints in it, oldest first. Those on the Hub are opened
    several at once.

    Returns:
        The checkpoints, and what a user should know about how they were found.

    Raises:
        SourceError: If a source leads nowhere, a directory holds checkpoints of several runs, or
            the selection leaves none.
        CheckpointError: If one cannot be read. Those opened before it are closed.
        HubError: If the Hub cannot be reached.
    """
    hub, selection = hub or HubAccess(), selection or Selection()
    found = find_candidates(sources, hub, selection)
    candidates = found.candidates
    try:
        open_candidates(candidates, state_key=state_key, hub=hub)
        taken, notes = _taken(found, selection)
        checkpoints = []
        for candidate in set(candidates) - set(taken):
            if candidate.checkpoint is not None:
                candidate.checkpoint.close()
        for candidate in taken:
            if candidate.problem is not None:
                if isinstance(candidate.problem, IncompleteCheckpointError):
                    candidate.problem.add_note(
                        "it is not the newest of its run, so not left out by itself; --match or "
                        "--steps leaves it out"
                    )
                raise candidate.problem
            if candidate.checkpoint is not None:
                checkpoints.append(candidate.checkpoint)
    except BaseException:
        close_all([one.checkpoint for one in candidates if one.checkpoint is not None])
        raise
    return checkpoints, [*notes, *duplicates(checkpoints)]


def open_source(
    source: str | Path | HubRevision, *, state_key: str | None, hub: HubAccess
) -> Checkpoint:
    """Open one checkpoint, local or on the Hub.

    Raises:
        SourceError: If it is not there, or names several.
        CheckpointError: If it cannot be read.
        HubError: If the Hub cannot be reached.
    """
    if isinstance(source, str) and hub_reference(source):
        found = expand_sources(source, hub)
        if len(found) != 1:
            raise SourceError(f"{source}: names {len(found)} checkpoints, expected one")
        (source,) = found
    if isinstance(source, HubRevision):
        return open_hub_checkpoint(source, hub.connection, state_key=state_key)
    return open_checkpoint(source, state_key=state_key)


class Found(NamedTuple):
    """What sources stand for, as far as names tell.

    Attributes:
        candidates: Those whose names match; only those that are taken, if ``is_chosen``.
        n_checkpoints: How many there are, those counted whose names do not match.
        is_chosen: Whether the selection has been applied.
    """

    candidates: list[Candidate]
    n_checkpoints: int
    is_chosen: bool


def find_candidates(
    sources: Source | Sequence[Source], hub: HubAccess, selection: Selection
) -> Found:
    """Return what sources stand for, run directories opened out, unless its name does not match.

    On the Hub, where every name tells its step, what the selection leaves out is left out here.

    Raises:
        SourceError: As ``expand_sources``; or a directory holds several runs, or is a checkpoint
            and a run at once with nothing to say which is meant.
        HubError: If the Hub cannot be asked.
    """
    found: list[Candidate] = []
    expanded = expand_sources(sources, hub)
    on_hub = [one for one in expanded if isinstance(one, HubRevision)]
    runs: dict[str | HubRevision, Run | None] = {}
    if on_hub:  # several at once; what is named after a step is a checkpoint, not a run
        asked = [one for one in on_hub if position_from_name(_last_part(one)).step is None]
        hub.connection.map(lambda one: runs.update({one: find_run_of(one, hub)}), asked)
    for source in expanded:
        run = runs.get(source) if isinstance(source, HubRevision) else find_run_of(source, hub)
        if run is not None and run.has_weights and not selection.is_given:
            raise SourceError(
                f"{run.label}: holds weights of its own and {len(run.names)} checkpoints inside; "
                "select among those, for example with --last 5, or name the weights' file"
            )
        if run is None:
            found.append(Candidate(source=source, name=_last_part(source)))
            continue
        found += _members(run, source)
    matching = [one for one in found if selection.matches(one.name)]
    if len(matching) < len(found):
        passed_over = _by_run([one for one in found if not selection.matches(one.name)])
        for one in matching:
            one.passed_over = passed_over.get(one.run, ()) if one.run is not None else ()
    if not matching:
        raise SourceError(f"none of {len(found)} checkpoints is called so: {selection}")
    steps = [one.position.step for one in matching]
    has_to_open = selection.uses_training or None in steps
    if has_to_open or any(not isinstance(one.source, HubRevision) for one in matching):
        return Found(matching, len(found), is_chosen=False)
    _refuse_mixtures(matching)
    kept = set(chosen_candidates(matching, selection)[0])
    return Found([one for one in matching if one in kept], len(found), is_chosen=True)


def open_run(
    source: Source, hub: HubAccess, *, state_key: str | None
) -> tuple[Run, list[Candidate]] | None:
    """Find and open the checkpoints in a run directory; None if the source is none.

    Raises:
        SourceError: If it is not there.
        HubError: If the Hub cannot be reached.
    """
    found = expand_sources(source, hub)
    run = find_run_of(found[0], hub) if len(found) == 1 else None
    if run is None:
        return None
    members = _members(run, found[0])
    try:
        open_candidates(members, state_key=state_key, hub=hub)
    except BaseException:
        close_all([one.checkpoint for one in members if one.checkpoint is not None])
        raise
    return run, members


def _members(run: Run, source: str | HubRevision) -> list[Candidate]:
    members = []
    for name in run.names:
        inside: str | HubRevision
        if isinstance(source, HubRevision):
            inside = source._replace(path=f"{source.path}/{name}".lstrip("/"))
        else:
            inside = os.path.join(source, name)  # noqa: PTH118  # "./x" stays as typed
        members.append(Candidate(source=inside, name=name.rpartition("/")[2], run=run))
    return members


def open_candidates(
    candidates: Sequence[Candidate], *, state_key: str | None, hub: HubAccess
) -> None:
    """Open all, and note in each what keeps it from being opened, or from being taken.

    Raises:
        SourceError: If something is not there.
        CheckpointError: If a checkpoint that was named itself cannot be opened.
        HubError: If the Hub cannot be reached.
    """

    def open_one(candidate: Candidate) -> None:
        try:
            candidate.checkpoint = open_source(candidate.source, state_key=state_key, hub=hub)
        except CheckpointError as error:
            if candidate.run is None:  # it was named: nothing else is worth a look
                raise
            candidate.problem = error

    on_hub = [one for one in candidates if isinstance(one.source, HubRevision)]
    if on_hub:
        hub.connection.map(open_one, on_hub)
    for candidate in candidates:
        if not isinstance(candidate.source, HubRevision):
            open_one(candidate)
    for members in _by_run(candidates).values():
        settle(members)


def _taken(found: Found, selection: Selection) -> tuple[list[Candidate], list[str]]:
    """Apply a selection; return what is taken, in the order typed, and notes on what is not."""
    candidates = found.candidates
    notes: list[str] = []
    there: list[Candidate] = []  # runs from their oldest checkpoint on
    _refuse_mixtures(candidates)
    for run, members in _by_run(candidates).items():
        notes += [
            f"{run.label}: left out {one.name}: {one.left_out}"
            for one in members
            if one.left_out is not None
        ]
        notes += [
            f"{run.label}: left out {name}: its name says that it is not finished"
            for name in run.unfinished
        ]
        if run.has_weights:
            notes.append(f"{run.label}: left out the weights beside the checkpoints")
        if all(one.left_out is not None for one in members):
            raise SourceError(f"{run.label}: holds no checkpoint to take: {notes[-1]}")
    by_run = _by_run(candidates)
    for candidate in candidates:
        if candidate.run is None:
            there.append(candidate)
        elif candidate.run in by_run:
            there += in_order([one for one in by_run.pop(candidate.run) if one.left_out is None])
    kept, why = (in_order(there), []) if found.is_chosen else chosen_candidates(there, selection)
    n_left_out = sum(one.left_out is not None for one in candidates)
    if len(kept) < found.n_checkpoints - n_left_out:
        names = kept[0].name if len(kept) == 1 else f"{kept[0].name} to {kept[-1].name}"
        notes.append(
            f"took {len(kept)} of {found.n_checkpoints - n_left_out} checkpoints ({selection}): "
            f"{names}"
        )
    is_kept = set(kept)
    taken = [one for one in there if one in is_kept]
    return taken, [
        *notes,
        *why,
        *doubts(kept, chosen_by_rate=selection.at_lr_minima or selection.constant_lr),
    ]


def chosen_candidates(
    candidates: Sequence[Candidate], selection: Selection
) -> tuple[list[Candidate], list[str]]:
    """Return those that a selection takes, oldest first, and why, one sentence each.

    Raises:
        SourceError: If there are too few, or what it goes by is not known.
        UsageError: If it goes by a metric that is not there.
    """
    steps = [one.position.step for one in candidates]
    if None in steps:
        by_age = in_order(candidates)
    else:  # of the same step in two runs: in the order typed
        by_age = sorted(candidates, key=lambda one: one.position.step or 0)
    steps, labels = [one.position.step for one in by_age], [one.label for one in by_age]
    if not selection.uses_training:
        return [by_age[index] for index in selection.chosen(steps, labels)], []
    for one in by_age:
        if one.problem is not None:
            raise one.problem
    runs = list(_by_run(by_age))
    if len(runs) > 1 and not selection.is_by_metric_alone:
        raise SourceError(
            f"{selection} goes by the training of one run, and {runs[0].label} and "
            f"{runs[1].label} are two: name one of them"
        )
    saved = [Saved(one.name, one.label, *one.position, one.checkpoint) for one in by_age]
    by_training = LogSelection(
        selection, saved, lambda: None if len(runs) > 1 else _history(by_age)
    )
    chosen = selection.chosen(steps, labels, by_training.narrow)
    return [by_age[index] for index in chosen], by_training.notes


def _history(by_age: Sequence[Candidate]) -> TrainingLog | None:
    """Return what transformers' Trainer keeps beside the newest checkpoint, or in the run itself.

    What is not as it should be is not known.
    """
    for one in reversed(by_age):
        folder = None if one.checkpoint is None else one.checkpoint.folder
        if folder is None:
            continue
        folders = [folder]
        if one.run is not None and isinstance(folder, LocalFolder):
            folders.append(LocalFolder(folder.path.parent, os.path.dirname(folder.label)))  # noqa: PTH120  # as typed
        for where in folders:
            with suppress(CheckpointError, SourceError):
                state = read_json(where, _TRAINER_STATE) or {}
                history = state.get("log_history")
                if isinstance(history, list) and history:
                    label = f"{where.label}/{_TRAINER_STATE}"
                    return log_of_rows(json_rows(history, label), label)
    return None


def _refuse_mixtures(candidates: Sequence[Candidate]) -> None:
    for run, members in _by_run(candidates).items():
        problem = mixture(members)
        if problem is not None:
            raise SourceError(f"{run.label}: {problem}")


def _by_run(candidates: Sequence[Candidate]) -> dict[Run, list[Candidate]]:
    runs: dict[Run, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.run is not None:
            runs.setdefault(candidate.run, []).append(candidate)
    return runs


def find_run_of(source: str | HubRevision, hub: HubAccess) -> Run | None:
    """Return the run that a directory is; None if it is none.

    Raises:
        SourceError: If it holds several.
        CheckpointError: If it may not be listed.
    """
    if isinstance(source, SingleCheckpoint):
        return None
    try:
        folder: Folder
        if isinstance(source, HubRevision):
            if names_a_file(source):
                return None
            folder = HubFolder(source, hub.connection)
        elif os.path.isdir(source):  # noqa: PTH112  # a name with a NUL byte is none
            folder = LocalFolder(Path(source), source)
        else:
            return None
        return find_run(folder)
    except OSError as error:  # a directory that may not be listed
        raise CheckpointError(f"{source}: cannot be read: {error.strerror}") from error


def _last_part(source: str | HubRevision) -> str:
    if isinstance(source, HubRevision):
        return source.path.rpartition("/")[2] or source.revision
    return os.path.basename(os.path.normpath(source))  # noqa: PTH119  # "." has none


def order_by_position(checkpoints: Sequence[Checkpoint]) -> list[int]:
    """Return the indices of the checkpoints, oldest first; see ``training_order``."""
    return training_order([Position(one.step, one.epoch) for one in checkpoints])


def close_all(checkpoints: Sequence[Checkpoint]) -> None:
    """Close the files of all checkpoints."""
    for checkpoint in checkpoints:
        checkpoint.close()
