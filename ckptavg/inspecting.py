"""What ``inspect`` finds: from the headers of one checkpoint, or of all in a run directory."""

from ckptavg.checkpoint import Checkpoint
from ckptavg.gathering import chosen_candidates, close_all, open_run
from ckptavg.results import CheckpointInfo, RunCheckpoint, RunInfo
from ckptavg.runs import Candidate, in_order, mixture
from ckptavg.selection import Selection
from ckptavg.sources import HubAccess, Source
from ckptavg.tensors import TensorInfo


def checkpoint_info(checkpoint: Checkpoint) -> CheckpointInfo:
    """Return what the headers of a checkpoint tell."""
    stored = _stored(checkpoint)
    return CheckpointInfo(
        source=checkpoint.label,
        layout=checkpoint.layout,
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        learning_rate=checkpoint.learning_rate,
        metrics=dict(checkpoint.metrics),
        nbytes=sum(info.nbytes for info in stored),
        n_parameters=sum(info.numel for info in stored),
        files=tuple(checkpoint.files),
        tensors=dict(checkpoint.tensors),
        aliases=dict(checkpoint.aliases),
        metadata=dict(checkpoint.metadata),
        notes=tuple(checkpoint.notes),
        hub=checkpoint.hub,
    )


def run_info(
    source: Source, hub: HubAccess, *, state_key: str | None, selection: Selection
) -> RunInfo | None:
    """Return what is known of the checkpoints in a run directory; None if it is none.

    Raises:
        SourceError: If it is not there, or the selection leaves nothing.
        CheckpointError: If it cannot be looked at.
        HubError: If the Hub cannot be reached.
    """
    found = open_run(source, hub, state_key=state_key)
    if found is None:
        return None
    run, members = found
    try:
        shown = in_order([one for one in members if selection.matches(one.name)])
        why: list[str] = []
        if selection.is_given:
            whole = [one for one in shown if one.left_out is None]
            shown, why = chosen_candidates(whole, selection)
        problem = mixture(shown)
        return RunInfo(
            source=run.label,
            checkpoints=tuple(_run_checkpoint(one) for one in shown),
            has_weights=run.has_weights,
            notes=(
                *([problem] if problem else []),
                *why,
                *(f"{name}: its name says that it is not finished" for name in run.unfinished),
            ),
        )
    finally:
        close_all([one.checkpoint for one in members if one.checkpoint is not None])


def _run_checkpoint(one: Candidate) -> RunCheckpoint:
    opened = one.checkpoint
    return RunCheckpoint(
        name=one.name,
        source=one.label,
        layout=None if opened is None else opened.layout,
        step=one.position.step,
        epoch=one.position.epoch,
        learning_rate=None if opened is None else opened.learning_rate,
        metrics={} if opened is None else dict(opened.metrics),
        nbytes=0 if opened is None else sum(info.nbytes for info in _stored(opened)),
        left_out=one.left_out,
        problem=None if one.problem is None else str(one.problem),
    )


def _stored(checkpoint: Checkpoint) -> list[TensorInfo]:
    """Return the tensors of a checkpoint, those with several names once."""
    return [
        info
        for name, info in checkpoint.tensors.items()
        if checkpoint.aliases.get(name) not in checkpoint.tensors
    ]
