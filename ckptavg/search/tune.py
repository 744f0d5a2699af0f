"""Coefficients searched on the simplex, by the user's metric, with an optimiser off the shelf."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from ckptavg.average_options import AverageOptions, Request
from ckptavg.errors import UsageError, told_storage_errors
from ckptavg.evaluation_log import judge_text
from ckptavg.metrics import Judge, Mode
from ckptavg.plan import AveragePlan
from ckptavg.prepare import prepared_average
from ckptavg.processes import check_alone
from ckptavg.results import BnPass, SweepRow, Trial, TuneResult
from ckptavg.schemes import Scheme
from ckptavg.scratch import Scratch
from ckptavg.search.checks import check_search
from ckptavg.search.evidence import tune_files
from ckptavg.search.sweep import contested
from ckptavg.sources import Source
from ckptavg.steps import stage_of

DEFAULT_TRIALS = 64
_STEP = 1.0  # of the optimiser at the start: a factor of about e between coefficients
_WORST = 1e30  # what the optimiser is told of a metric that is not a number

Logits = NDArray[np.float64]


@told_storage_errors()
def tune(
    sources: Source | Sequence[Source],
    output: str | Path,
    *,
    evaluation: BnPass,
    metric: str | None = None,
    mode: Mode | None = None,
    trials: int = DEFAULT_TRIALS,
    seed: int = 0,
    plot: bool = False,
    **options: Unpack[AverageOptions],
) -> TuneResult:
    """Search coefficients that are not negative and sum to 1 for the best average by a metric.

    CMA-ES (Hansen and Ostermeier 2001; the package cma, extra ``tune``) over logits, whose softmax
    are the coefficients; it starts at the uniform mean. Each of its generations is one read of the
    checkpoints that makes all its averages, each with a BatchNorm pass of its own where
    ``evaluation`` has batches. The uniform mean and recency weights are tried first, so the result
    is never worse than they are by the metric.

    So many numbers fitted to a validation set fit its noise, too: keep a test set aside, and expect
    little over the uniform mean.

    A search that was interrupted, or whose evaluation failed, is continued by the same call.

    Args:
        sources: As in ``average_checkpoints``.
        output: The model directory to make, with ``tune.json`` and ``tune.csv`` in it.
        evaluation: The metric, the model, and data for the BatchNorm passes.
        metric: Name of the metric that decides; None where there is only one.
        mode: ``min`` or ``max``; None goes by the metric's name.
        trials: How many averages are tried at most; at least 2.
        seed: Of the optimiser's random numbers.
        plot: Add ``tune.png``, which needs the extra ``plots``.
        options: As in ``average_checkpoints``; one process does all.

    Raises:
        UsageError: If nothing judges, the metric is not clear, there is but one checkpoint, or cma
            is not installed.
        ModelError: If the evaluation fails.
        CkptavgError: As ``average_checkpoints`` does.
    """
    output = Path(output)
    evaluation = check_tune(
        evaluation, trials=trials, plot=plot, distributed=options.get("distributed", False)
    )
    judge = Judge(metric, mode)

    def request(schemes: Sequence[Scheme], **changed: Any) -> Request:
        return Request.of(schemes, {**options, **changed}, metric=metric, mode=mode)

    whole = request([Scheme()])
    with prepared_average(
        sources, output, whole.recipe, batchnorm=evaluation, **whole.preparing
    ) as prepared:  # what does not fit shows now
        n, fingerprint = prepared.plan.n_checkpoints, prepared.plan.fingerprint
    if n < 2:
        raise UsageError("a search over coefficients needs at least 2 checkpoints")
    named = judge_text(evaluation)
    identity = named and repr((fingerprint, named, metric, mode, seed))
    with Scratch(output, "tune", identity) as scratch:
        known: dict[tuple[float, ...], Mapping[str, float]] = {
            tuple(entry["coefficients"]): dict(entry["metrics"])
            for entry in scratch.entries
            if "coefficients" in entry
        }
        found: list[Trial] = []
        report = stage_of(whole.progress, "trying averages", trials)
        search = _asked(n, trials, seed)
        asked: list[tuple[float, ...]] | None = next(search)
        while asked:
            new = [one for one in dict.fromkeys(asked) if one not in known]
            if new:
                known |= _judged(sources, scratch, new, request, evaluation, judge)
            found += [Trial(coefficients=one, metrics=known[one]) for one in asked]
            report(len(asked))
            try:
                asked = search.send([_cost(judge, known[one]) for one in asked])
            except StopIteration:
                asked = None
        best = found[judge.best({at: trial.metrics for at, trial in enumerate(found)})]
        schemes = [Scheme(name="coefficients", coefficients=best.coefficients, label="tuned")]

        def files(plan: AveragePlan, rows: Sequence[SweepRow]) -> dict[str, bytes]:
            return tune_files(judge, plan, found, command=whole.command, plot=plot)

        published = contested(
            sources, output, request(schemes), evaluation, judge, files,
            keep="best", controls="last",
        )  # fmt: skip
    metric, mode = judge.settled
    return TuneResult(
        metric=metric,
        mode=mode,
        trials=tuple(found),
        best=best,
        result=published.result,
        files=published.files,
    )


def check_tune(
    evaluation: BnPass | None, *, trials: int, plot: bool, distributed: bool = False
) -> BnPass:
    """Refuse what cannot become a search; return the evaluation.

    Raises:
        UsageError: If nothing judges, or what is wanted cannot be had.
    """
    evaluation = check_search("a search", evaluation, plot=plot)
    check_alone("a search", distributed=distributed)
    if trials < 2:
        raise UsageError(f"trials is {trials}, expected at least 2")
    if importlib.util.find_spec("cma") is None:
        raise UsageError("the search needs the package cma: pip install 'ckptavg[tune]'")
    return evaluation


def _asked(n: int, trials: int, seed: int) -> Generator[list[tuple[float, ...]], list[float], None]:
    """Yield what to try, generation by generation, and be sent what each costs."""
    import cma

    uniform, linear = [1 / n] * n, [2 * i / (n * (n + 1)) for i in range(1, n + 1)]
    options = {"seed": seed + 1, "verbose": -9, "verb_log": 0}  # 0 would take the time of day
    strategy = cma.CMAEvolutionStrategy(np.zeros(n), _STEP, options)
    left = trials
    first = [tuple(uniform), tuple(linear)]
    while left > 0 and not strategy.stop():
        logits = strategy.ask()
        asked = [*first, *map(_softmax, logits)][:left]
        costs = yield asked
        left -= len(asked)
        if len(asked) == len(first) + len(logits):
            strategy.tell(logits, costs[len(first) :])
        first = []


def _softmax(logits: Logits) -> tuple[float, ...]:
    powers = np.exp(logits - logits.max())
    return tuple(float(one) for one in powers / powers.sum())


def _cost(judge: Judge, metrics: Mapping[str, float]) -> float:
    """Return what the optimiser makes small."""
    is_nan, cost = judge.badness(metrics)
    return _WORST if is_nan else min(max(cost, -_WORST), _WORST)


def _judged(
    sources: Source | Sequence[Source],
    scratch: Scratch,
    asked: Sequence[tuple[float, ...]],
    request: Callable[..., Request],
    evaluation: BnPass,
    judge: Judge,
) -> dict[tuple[float, ...], Mapping[str, float]]:
    """Make averages from one read, and return what the evaluation says of each."""
    labels = [f"trial-{number}" for number in range(len(asked))]
    schemes = [
        Scheme(name="coefficients", coefficients=one, label=label)
        for one, label in zip(asked, labels, strict=True)
    ]
    made: dict[tuple[float, ...], Mapping[str, float]] = {}

    def judged(number: int, metrics: Mapping[str, float]) -> None:
        made[asked[number]] = metrics
        scratch.note({"coefficients": asked[number], "metrics": metrics})

    place = scratch.path / "generation"
    contested(
        sources, place, request(schemes, overwrite=True, planned=None), evaluation, judge,
        lambda plan, rows: {}, keep="best", controls="none", judged=judged,
    )  # fmt: skip
    shutil.rmtree(place, ignore_errors=True)
    return made
