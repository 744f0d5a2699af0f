"""What ``inspect`` prints: of one checkpoint, of a run, of a repository on the Hub."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ckptavg.cli.render import table
from ckptavg.units import size

if TYPE_CHECKING:
    from ckptavg.results import CheckpointInfo, RunCheckpoint, RunInfo
    from ckptavg.tensors import HubRevision

_COMMIT_DIGITS = 12


def run_lines(info: "RunInfo") -> list[str]:
    """Return what ``inspect`` shows of a run directory: a line a checkpoint, oldest first."""
    names = list(dict.fromkeys(name for one in info.checkpoints for name in one.metrics))
    has_epochs = any(one.epoch is not None for one in info.checkpoints)
    header = ["  checkpoint", "step", *(["epoch"] if has_epochs else []), *names, "lr", "size"]
    rows = []
    for one in info.checkpoints:
        metrics = [_number(one.metrics.get(name)) for name in names]
        epoch = [_number(one.epoch)] if has_epochs else []
        rows.append(
            [
                f"  {one.name}",
                _number(one.step),
                *epoch,
                *metrics,
                _number(one.learning_rate),
                size(one.nbytes) if one.nbytes else "-",
                one.layout or "-",
                _state(one),
            ]
        )
    whole = sum(one.left_out is None and one.problem is None for one in info.checkpoints)
    plural = "" if len(info.checkpoints) == 1 else "s"
    lines = [
        f"{info.source}: a run of {len(info.checkpoints)} checkpoint{plural}, {whole} to take",
        *table([*header, "layout", ""], rows),
    ]
    lines += [
        f"  {one.name}: {_state(one)}, {one.left_out or one.problem}"
        for one in info.checkpoints
        if one.left_out is not None or one.problem is not None
    ]
    lines += [f"  note: {note}" for note in info.notes]
    return lines


def _state(one: "RunCheckpoint") -> str:
    if one.left_out is not None:
        return "left out"
    return "complete" if one.problem is None else "cannot be read"


def run_json(info: "RunInfo") -> dict[str, Any]:
    """Return what ``inspect --json`` prints of a run directory."""
    return asdict(info)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def checkpoint_lines(info: "CheckpointInfo") -> list[str]:
    """Return what ``inspect`` shows of one checkpoint."""
    known: list[tuple[str, float | None]] = [
        ("step", info.step),
        ("epoch", info.epoch),
        ("lr", info.learning_rate),
        *info.metrics.items(),
    ]
    position = [f"{name} {_number(value)}" for name, value in known if value is not None]
    files = f"{len(info.files)} file{'s' if len(info.files) != 1 else ''}"
    lines = [
        f"{info.source}{_commit(info.hub)}: {', '.join([info.layout, *position])}, "
        f"{len(info.tensors)} tensors, "
        f"{info.n_parameters:,} values, {size(info.nbytes)} in {files}",
    ]
    lines += [f"  metadata {key}: {value}" for key, value in info.metadata.items()]
    lines += [f"  note: {note}" for note in info.notes]
    rows = [
        [
            f"  {name}",
            str(tensor.dtype),
            "x".join(map(str, tensor.shape)) or "scalar",
            size(tensor.nbytes),
            f"tied to {info.aliases[name]}" if name in info.aliases else "",
        ]
        for name, tensor in info.tensors.items()
    ]
    lines += table(["  tensor", "dtype", "shape", "size", ""], rows)
    lines += [
        f"  {name}: not stored, tied to {owner}"
        for name, owner in info.aliases.items()
        if name not in info.tensors
    ]
    return lines


def checkpoint_json(info: "CheckpointInfo") -> dict[str, Any]:
    """Return what ``inspect --json`` prints of one checkpoint."""
    return {
        "source": info.source,
        "hub": None if info.hub is None else info.hub._asdict(),
        "layout": info.layout,
        "step": info.step,
        "epoch": info.epoch,
        "learning_rate": info.learning_rate,
        "metrics": dict(info.metrics),
        "nbytes": info.nbytes,
        "n_parameters": info.n_parameters,
        "files": [{"path": file.path, "nbytes": file.size} for file in info.files],
        "metadata": dict(info.metadata),
        "notes": list(info.notes),
        "aliases": dict(info.aliases),
        "tensors": {
            name: {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "nbytes": tensor.nbytes}
            for name, tensor in info.tensors.items()
        },
    }


def revision_lines(repo: str, revisions: "Sequence[HubRevision]") -> list[str]:
    """Return what ``inspect`` shows of a whole repository on the Hub."""
    rows = [
        [f"  {repo}@{one.revision}", _step(one.revision), one.commit[:_COMMIT_DIGITS]]
        for one in revisions
    ]
    return [
        f"{repo}: {len(revisions)} branches and tags; name one to see what is in it",
        *table(["  revision", "step", "commit"], rows),
    ]


def revisions_json(repo: str, revisions: "Sequence[HubRevision]") -> dict[str, Any]:
    """Return what ``inspect --json`` prints of a whole repository on the Hub."""
    from ckptavg.checkpoint.position import position_from_name

    return {
        "repo": repo,
        "revisions": [
            {
                "revision": one.revision,
                "commit": one.commit,
                "step": position_from_name(one.revision).step,
            }
            for one in revisions
        ],
    }


def _step(revision: str) -> str:
    from ckptavg.checkpoint.position import position_from_name

    step = position_from_name(revision).step
    return "" if step is None else str(step)


def _commit(found: "HubRevision | None") -> str:
    return "" if found is None else f" ({found.commit[:_COMMIT_DIGITS]})"
