"""Whether checkpoints should be averaged at all: what is known to bring nothing, or to hurt."""

from collections.abc import Sequence
from itertools import combinations, pairwise

from ckptavg.checkpoint import Checkpoint
from ckptavg.runs import Candidate, Run

_DECAY = 3.0  # a learning rate that falls by this factor is being annealed


def doubts(taken: Sequence[Candidate], *, chosen_by_rate: bool) -> list[str]:
    """Return what speaks against averaging checkpoints, where it is known, one sentence each.

    Args:
        taken: Oldest first.
        chosen_by_rate: Whether they were chosen by their learning rates, which is no doubt then.
    """
    return [
        *([] if chosen_by_rate else _decay(taken)),
        *_different_seeds(taken),
        *_overlapping_runs(taken),
    ]


def _decay(taken: Sequence[Candidate]) -> list[str]:
    """Point out a learning rate that falls and never rises across the checkpoints.

    Averaging and decay do not add up: Sanyal et al. 2023 (LAWA) and Ajroldi et al. 2025 find the
    gain at a constant or high rate; checkpoints from before and after a decay are of different
    quality, and their mean is seldom better than the last.
    """
    opened = [one.checkpoint for one in taken if one.checkpoint is not None]
    rates = [one.learning_rate for one in opened if one.learning_rate is not None]
    falls = all(later <= rate * (1 + 1e-9) for rate, later in pairwise(rates))
    if (
        len(rates) < 2
        or not falls
        or rates[0] < _DECAY * rates[-1] * (1 - 1e-9)
        or rates[0] == rates[-1]
    ):
        return []
    return [
        f"the learning rate falls from {rates[0]:.6g} to {rates[-1]:.6g} across these checkpoints: "
        "averaging across a decay is known to bring nothing or to hurt; --constant-lr takes those "
        "before it"
    ]


def _different_seeds(taken: Sequence[Candidate]) -> list[str]:
    seeds: dict[int, str] = {}
    for one in taken:
        if one.checkpoint is not None and one.checkpoint.seed is not None:
            seeds.setdefault(one.checkpoint.seed, one.label)
    if len(seeds) < 2:
        return []
    (seed, label), (other_seed, other) = list(seeds.items())[:2]
    return [
        f"{label} is of a run with seed {seed}, {other} of one with seed {other_seed}: weights of "
        "runs with different seeds do not average"
    ]


def _overlapping_runs(taken: Sequence[Candidate]) -> list[str]:
    """Point out two run directories that cannot be one run continued, since their steps overlap."""
    steps: dict[Run, list[int]] = {}
    for one in taken:
        if one.run is not None and one.position.step is not None:
            steps.setdefault(one.run, []).append(one.position.step)
    for (run, ours), (other, theirs) in combinations(steps.items(), 2):
        is_apart = max(ours) < min(theirs) or max(theirs) < min(ours)
        if not is_apart and not set(ours) & set(
            theirs
        ):  # those of one step have a note of their own
            return [
                f"{run.label} (steps {min(ours)} to {max(ours)}) and {other.label} ({min(theirs)} "
                f"to {max(theirs)}) overlap: if these are two runs with different seeds, their "
                "weights do not average"
            ]
    return []


def duplicates(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Say which checkpoints are the same, and which hold some of the same files."""
    seen: dict[tuple[tuple[int, int] | str, ...], str] = {}
    holders: dict[tuple[int, int] | str, str] = {}
    notes, shared = [], list[tuple[str, str]]()
    for checkpoint in checkpoints:
        identity = tuple(file.identity for file in checkpoint.files if file.holds_weights)
        if identity in seen:
            notes.append(
                f"{checkpoint.label} is the same checkpoint as {seen[identity]}: it counts twice"
            )
            continue
        seen[identity] = checkpoint.label
        others = {holders[one] for one in identity if one in holders}
        shared += [(checkpoint.label, other) for other in sorted(others)]
        holders |= dict.fromkeys(identity, checkpoint.label)
    notes += _same_steps(checkpoints)
    if shared:
        one, other = shared[0]
        more = f", as do {len(shared) - 1} more pairs" if len(shared) > 1 else ""
        notes.append(f"{one} and {other} have weight files in common{more}: were they trained?")
    return notes


def _same_steps(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Point out checkpoints of one step: copies, as Lightning's ``last.ckpt``, or other runs."""
    first: dict[int, Checkpoint] = {}
    notes = []
    for checkpoint in checkpoints:
        if checkpoint.step is None:
            continue
        other = first.setdefault(checkpoint.step, checkpoint)
        files = [
            {file.identity for file in one.files if file.holds_weights}
            for one in (checkpoint, other)
        ]
        if other is not checkpoint and files[0] != files[1]:
            notes.append(
                f"{checkpoint.label} and {other.label} are both of step {checkpoint.step}: is one "
                "a copy, or are these two runs?"
            )
    return notes if len(notes) < 2 else [notes[0], f"{len(notes) - 1} more share a step"]
