"""Pictures of ensembles of checkpoints, and of the averages of their weights."""

from collections.abc import Sequence
from typing import Any

from ckptavg.ensemble_results import EnsembleResult, LoaderComparison, ReliabilityBin
from ckptavg.plots.style import BLACK, BLUE, GREY, ORANGE, open_up, pictures, styled

_ROW_HEIGHT = 3.3
_LARGEST_DOT = 300  # square points, for a bin with all predictions


@styled()
def ensemble_plot(result: EnsembleResult) -> dict[str, bytes]:
    """Draw ensemble and average over the number of members, and whether they are calibrated.

    Every loader has a row: accuracy, negative log-likelihood, reliability diagram.

    Args:
        result: What was found.

    Returns:
        ``ensemble.png`` and ``ensemble.svg``.
    """
    from matplotlib.figure import Figure

    n_rows = len(result.loaders)
    figure = Figure(figsize=(12, _ROW_HEIGHT * n_rows + 0.7), layout="constrained")
    panels = figure.subplots(n_rows, 3, squeeze=False)
    for row, found in zip(panels, result.loaders, strict=True):
        _draw_scores(row[0], found, "accuracy", f"accuracy on {found.name} (%)")
        _draw_scores(row[1], found, "nll", f"NLL on {found.name} (nats per label)")
        _draw_reliability(row[2], found)
    first = "oldest first" if result.order == "oldest" else "newest first"
    panels[0][0].set_title("higher is better")
    panels[0][1].set_title("lower is better")
    panels[0][2].set_title("reliability: above the diagonal is too modest")
    for panel in panels[-1][:2]:
        panel.set_xlabel(f"checkpoints, {first}")
    panels[-1][2].set_xlabel("confidence (%); large dots hold many labels")
    handles = [*panels[0][0].get_lines(), *panels[0][2].get_lines()[1:2]]  # after the diagonal
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    open_up(figure)
    return pictures("ensemble", figure)


def _draw_scores(panel: Any, found: LoaderComparison, metric: str, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    places = range(1, len(found.members) + 1)
    for scores, style, color, label in (
        (found.members, ".", GREY, "a checkpoint by itself"),
        (found.ensembles, "s-", ORANGE, "ensemble of so many"),
        (found.averages, "o-", BLUE, "average of so many"),
    ):
        values = [getattr(one, metric) for one in scores]
        panel.plot(places, values, style, color=color, label=label, markersize=5)
    panel.set_ylabel(name)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_reliability(panel: Any, found: LoaderComparison) -> None:
    panel.plot([0, 100], [0, 100], linestyle=":", color=GREY, linewidth=1)
    for bins, marker, color, label in (
        (found.newest_reliability, "^", BLACK, "the newest checkpoint"),
        (found.ensemble_reliability, "s", ORANGE, "ensemble of all"),
        (found.average_reliability, "o", BLUE, "average of all"),
    ):
        confidence, accuracy, shares = _curve(bins)
        panel.plot(confidence, accuracy, marker=marker, color=color, label=label, markersize=2)
        sizes = [_LARGEST_DOT * share for share in shares]
        panel.scatter(confidence, accuracy, sizes, marker=marker, color=color, alpha=0.6)
    panel.set_ylabel(f"accuracy on {found.name} (%)")
    panel.set_aspect("equal")
    panel.set_xlim(0, 100)
    panel.set_ylim(0, 102)


def _curve(bins: Sequence[ReliabilityBin]) -> tuple[list[float], list[float], list[float]]:
    """Return confidence, accuracy and share of all predictions, of the bins that hold any."""
    n_labels = sum(one.count for one in bins)
    there = [
        (one.confidence, one.accuracy, one.count / n_labels)
        for one in bins
        if one.confidence is not None and one.accuracy is not None
    ]
    confidences, accuracies, shares = zip(*there, strict=True)
    return list(confidences), list(accuracies), list(shares)
