"""The figures of the paper: what each one takes, and where it puts numbers and pictures."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from averages import averaged_epochs
from files import has_matplotlib, write_csv, write_json, write_pictures
from setups import Setup
from training import BRANCH, BUDGETS

from ckptavg.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, open_up, pictures, styled

Measured = Sequence[dict[str, Any]]  # of one set-up, one a seed


class Curve(NamedTuple):
    """Test errors over epochs.

    Attributes:
        name: In the legend.
        color: Of its line.
        style: Of its line.
        epochs: Where it has values.
        runs: The test errors in percent, of each seed.
    """

    name: str
    color: str
    style: str
    epochs: Sequence[int]
    runs: Sequence[Sequence[float]]

    @property
    def mean(self) -> list[float]:
        """Mean over the seeds."""
        return [fmean(values) for values in zip(*self.runs, strict=True)]


def figure_6(folder: Path, setup: Setup, measured: Measured) -> None:
    """Fig. 6: iterates and their running average after the branch, by learning-rate schedule."""
    branch, end = setup.epochs(BRANCH), setup.epochs(BUDGETS[-1])
    one_budget = setup.epochs(BUDGETS[0])
    curves = [
        iterates("SGD, 1 budget", GREY, "-", "sgd-1", range(branch, one_budget + 1), measured),
        iterates("SGD, 1.5 budgets", BLACK, "-", "sgd-1.5", range(branch, end + 1), measured),
    ]
    for name, color, arm in (("constant", ORANGE, "constant"), ("cyclical", BLUE, "cyclical")):
        epochs = averaged_epochs(setup, arm)
        curves += [
            iterates(f"iterates, {name} rate", color, ":", arm, epochs, measured),
            running_average(f"SWA, {name} rate", color, "-", arm, epochs, measured),
        ]
    show_over_epochs(
        f"fig6-{setup.name}",
        folder,
        curves,
        f"Fig. 6, {setup.name}: constant and cyclical rates after {branch} epochs of SGD",
    )


def figure_7(folder: Path, setup: Setup, measured: Measured) -> None:
    """Fig. 7: one fixed learning rate from scratch, and the average of its last half."""
    end = setup.epochs(BUDGETS[-1])
    averaged = averaged_epochs(setup, "fixed")
    everything = range(1, end + 1)
    curves = [
        iterates("SGD, decayed rate", BLACK, "-", "sgd-1.5", everything, measured),
        iterates("iterates, fixed rate", GREEN, ":", "fixed", everything, measured),
        running_average("SWA, fixed rate", GREEN, "-", "fixed", averaged, measured),
    ]
    show_over_epochs(
        f"fig7-{setup.name}",
        folder,
        curves,
        f"Fig. 7, {setup.name}: a fixed rate from scratch, averaged from epoch {averaged[0]}",
    )


def iterates(
    name: str, color: str, style: str, arm: str, epochs: Sequence[int], measured: Measured
) -> Curve:
    """Return the test errors of checkpoints as they are."""
    runs = [[one["test_error"][arm][str(epoch)] for epoch in epochs] for one in measured]
    return Curve(name, color, style, epochs, runs)


def running_average(
    name: str, color: str, style: str, arm: str, epochs: Sequence[int], measured: Measured
) -> Curve:
    """Return the test errors of the averages up to each epoch."""
    swa = [
        [100 - one["swa"][arm][str(epoch)]["swa"]["accuracy"] for epoch in epochs]
        for one in measured
    ]
    return Curve(name, color, style, epochs, swa)


def show_over_epochs(name: str, folder: Path, curves: Sequence[Curve], title: str) -> None:
    """Write curves as numbers, and as pictures where matplotlib is there."""
    write_json(
        folder / f"{name}.json",
        {
            "title": title,
            "curves": [
                {"name": curve.name, "epochs": list(curve.epochs), "test_error": curve.runs}
                for curve in curves
            ],
        },
    )
    write_csv(
        folder / f"{name}.csv",
        ["curve", "epoch", "mean", *(f"run {at}" for at in range(len(curves[0].runs)))],
        [
            (curve.name, epoch, mean, *values)
            for curve in curves
            for epoch, mean, *values in zip(curve.epochs, curve.mean, *curve.runs, strict=True)
        ],
    )
    if has_matplotlib():
        draw_over_epochs(name, folder, curves, title)


@styled()
def draw_over_epochs(name: str, folder: Path, curves: Sequence[Curve], title: str) -> None:
    """Draw curves: the mean over the seeds, and how far the seeds are apart as a band."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    panel = figure.subplots()
    for curve in curves:
        panel.plot(
            curve.epochs, curve.mean, curve.style, color=curve.color, linewidth=1.8,
            label=curve.name,
        )  # fmt: skip
        if curve.style == "-":
            by_epoch = list(zip(*curve.runs, strict=True))
            panel.fill_between(
                curve.epochs, [min(values) for values in by_epoch],
                [max(values) for values in by_epoch], color=curve.color, alpha=0.15, linewidth=0,
            )  # fmt: skip
    panel.set_title(title)
    panel.set_xlabel("epoch")
    panel.set_ylabel("test error, %")
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(FixedLocator([1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 80]))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=3)
    open_up(figure)
    write_pictures(folder, pictures(name, figure))
