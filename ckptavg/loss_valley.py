"""SWAD's window: from where validation losses have come down to where they rise again."""

import math
from collections.abc import Sequence

OPTIMUM_PATIENCE = 3  # n_converge in the authors' code
OVERFIT_PATIENCE = 6  # n_tolerance
TOLERANCE = 0.3  # tolerance_ratio; they take 0.2 for VLCS


def swad_window(
    losses: Sequence[float],
    *,
    tolerance: float = TOLERANCE,
    optimum_patience: int = OPTIMUM_PATIENCE,
    overfit_patience: int = OVERFIT_PATIENCE,
) -> tuple[int, int] | None:
    """Return the first and the last of the losses between which SWAD averages, both included.

    Cha et al. 2021, Algorithm 1: the window begins with the first of ``N_s`` losses in a row that
    is their minimum; it ends before the first ``N_e`` in a row that all exceed ``r`` times the mean
    of those ``N_s`` losses, or else with the last loss.

    Args:
        losses: Of validations at even distances, oldest first; positive, NaN counts as infinite.
        tolerance: ``r - 1``.
        optimum_patience: ``N_s``.
        overfit_patience: ``N_e``.

    Returns:
        None if they never stop falling.
    """
    known = [math.inf if math.isnan(loss) else loss for loss in losses]
    start, limit = None, math.inf
    for at in range(len(known)):
        if start is None:
            window = known[at - optimum_patience + 1 : at + 1] if at + 1 >= optimum_patience else []
            if window and window[0] == min(window) and max(window) < math.inf:
                start = at - optimum_patience + 1
                limit = (1 + tolerance) * sum(window) / len(window)
        elif at - overfit_patience >= start and limit < min(
            known[at - overfit_patience + 1 : at + 1]
        ):
            return start, at - overfit_patience
    return None if start is None else (start, len(known) - 1)
