"""Pictures of searches: what was tried, and what came of it."""

import re
from collections.abc import Sequence

from ckptavg.metrics import Judge
from ckptavg.plots.style import BLACK, BLUE, ORANGE, open_up, png, short, styled, with_direction
from ckptavg.results import ComparisonRow, SoupStep, SweepRow, Trial

_CONTROL_STYLES = ((BLACK, ":"), (BLACK, "--"), (ORANGE, ":"), (ORANGE, "--"))
_LAST_SO_MANY = re.compile(r"uniform(:last=\d+)?")
_CURVE_POINTS = 3


@styled()
def sweep_plot(
    averages: Sequence[SweepRow], controls: Sequence[ComparisonRow], judge: Judge
) -> bytes:
    """Draw the averages of a sweep against what one has without averaging.

    Where at least three uniform means of the last checkpoints are among them, a second panel shows
    the metric over their number.

    Args:
        averages: Best first.
        controls: What they are compared with.
        judge: The metric.

    Returns:
        A PNG image.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curve = sorted(
        (row.n_checkpoints, judge.value(row.metrics))
        for row in averages
        if row.scheme is not None and _LAST_SO_MANY.fullmatch(row.scheme)
    )
    has_curve = len(curve) >= _CURVE_POINTS
    height = 1.6 + 0.26 * len(averages)
    figure = Figure(figsize=(11 if has_curve else 7, max(height, 3.2)), layout="constrained")
    panels = figure.subplots(1, 2 if has_curve else 1, squeeze=False)[0]
    worst_first = averages[::-1]
    values = [judge.value(row.metrics) for row in worst_first]
    dots, place = panels[0], range(len(averages))
    dots.hlines(place, min(values), values, color=BLUE, alpha=0.3, linewidth=1)
    dots.plot(values, place, "o", color=BLUE)
    dots.set_yticks(place, [short(row.name) for row in worst_first])
    dots.set_xlabel(with_direction(judge))
    dots.set_title("averages, best on top", fontsize="medium")
    if has_curve:
        numbers, heights = zip(*curve, strict=True)
        panels[1].plot(numbers, heights, "o-", color=BLUE, label="uniform mean")
        panels[1].set_xlabel("checkpoints averaged")
        panels[1].set_ylabel(judge.metric)
        panels[1].set_title("over the number of checkpoints", fontsize="medium")
        panels[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for row, (color, style) in zip(controls, _CONTROL_STYLES, strict=False):
        value, label = judge.value(row.metrics), row.name.partition(":")[0]
        dots.axvline(value, color=color, linestyle=style, linewidth=1.2, label=label)
        if has_curve:
            panels[1].axhline(value, color=color, linestyle=style, linewidth=1.2)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    open_up(figure)
    return png(figure)


@styled()
def soup_plot(steps: Sequence[SoupStep], judge: Judge) -> bytes:
    """Draw how a greedy soup was made: what each candidate is alone, and the mean with it.

    Args:
        steps: In the order of trying.
        judge: The metric.

    Returns:
        A PNG image.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4), layout="constrained")
    panel = figure.subplots()
    places = range(1, len(steps) + 1)
    alone = [judge.value(step.metrics) for step in steps]
    means = [judge.value(step.mean_metrics) for step in steps]
    soup = [
        next(mean for mean, step in zip(means[at::-1], steps[at::-1], strict=True) if step.accepted)
        for at in range(len(steps))
    ]
    accepted = [at for at in places if steps[at - 1].accepted]
    rejected = [at for at in places if not steps[at - 1].accepted]
    panel.step(places, soup, where="post", color=BLUE, label="the soup")
    panel.plot(accepted, [means[at - 1] for at in accepted], "o", color=BLUE, label="accepted")
    panel.plot(rejected, [means[at - 1] for at in rejected], "x", color=ORANGE, label="rejected")
    panel.plot(places, alone, ".", color=BLACK, label="the candidate alone")
    panel.set_xlabel("candidate, best first")
    panel.set_ylabel(with_direction(judge))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    open_up(figure)
    return png(figure)


@styled()
def tune_plot(trials: Sequence[Trial], judge: Judge) -> bytes:
    """Draw a search over coefficients: what was tried, the best so far, the best coefficients.

    Args:
        trials: In the order of trying; the first is the uniform mean.
        judge: The metric.

    Returns:
        A PNG image.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4), layout="constrained")
    course, weights = figure.subplots(1, 2)
    values = [judge.value(trial.metrics) for trial in trials]
    places = range(1, len(trials) + 1)
    best = [0]
    for at in range(1, len(trials)):
        better = judge.is_better(trials[at].metrics, trials[best[-1]].metrics)
        best.append(at if better else best[-1])
    course.plot(places, values, ".", color=BLACK, label="tried")
    course.step(places, [values[at] for at in best], where="post", color=BLUE, label="best so far")
    course.axhline(values[0], color=ORANGE, linestyle="--", label="uniform mean")
    course.set_xlabel("average tried")
    course.set_ylabel(with_direction(judge))
    chosen = trials[best[-1]].coefficients
    numbers = range(1, len(chosen) + 1)
    weights.bar(numbers, chosen, color=BLUE, label="best")
    weights.axhline(1 / len(chosen), color=ORANGE, linestyle="--")
    weights.set_xlabel("checkpoint, oldest first")
    weights.set_ylabel("coefficient")
    for panel in (course, weights):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    course.legend(fontsize="small", frameon=False)
    open_up(figure)
    return png(figure)
