"""The schemes there are: what each is called, takes and computes; the one list of them."""

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ckptavg.coefficients import CoefficientRow, GaussianNoise, Trimmed
from ckptavg.errors import UsageError
from ckptavg.schemes import formulas
from ckptavg.schemes.decay_merging import DECAYS, NEVER_ZERO, merged_decay
from ckptavg.schemes.options import Option, Real, Several, Whole, Word
from ckptavg.schemes.power_ema import MAX_SIGMA, fit_power_ema, power_ema
from ckptavg.schemes.windows import WINDOW_OPTIONS, Window

Given = Mapping[str, Any]  # the options that were given, by field

_SUM_TOLERANCE = 1e-6
DEFAULT_SAMPLES = 10  # of swag, like the next
_DEFAULT_RANK, _DEFAULT_SEED, _DEFAULT_SCALE = 20, 0, 1.0
_DEFAULT_FINAL = 0.1  # of decays that never end at 0
_FRACTION_ROUNDING = 1e-9  # 1/3 of 3 checkpoints is 1

_DECAY = Real(0, 1)
_SIGMA = Real(0, MAX_SIGMA, with_high=True)


@dataclass(frozen=True, slots=True)
class SchemeKind:
    """One scheme.

    Attributes:
        name: What one types.
        summary: What it is, in a line.
        rows: Options and window -> the rows; several only for ``swag``.
        options: Its own; those of the window come after them.
        usage: Its options, as they are explained.
        example: As typed.
        has_window: Whether it takes ``last=`` and the like.
        positional: Whether its one option is typed without a key.
        one_step_each: Whether two checkpoints of one step make no sense.
        check: Refuses options that do not go together, by raising ValueError with the reason.
    """

    name: str
    summary: str
    rows: Callable[[Given, Window], list[CoefficientRow]]
    options: tuple[Option, ...] = ()
    usage: str = ""
    example: str = ""
    has_window: bool = True
    positional: bool = False
    one_step_each: bool = True
    check: Callable[[Given], None] = lambda given: None

    @property
    def all_options(self) -> tuple[Option, ...]:
        """Its own options, and those of the window."""
        return (*self.options, *WINDOW_OPTIONS) if self.has_window else self.options


def _uniform(given: Given, window: Window) -> list[CoefficientRow]:
    """Theta = (1/n) sum_k theta_k (Izmailov et al. 2018, Algorithm 1, unrolled)."""
    return [window.row([1.0] * len(window))]


def _linear(given: Given, window: Window) -> list[CoefficientRow]:
    return [window.row(formulas.linear(len(window)))]


def _ema(given: Given, window: Window) -> list[CoefficientRow]:
    if "decay" in given:
        values = formulas.ema(len(window), given["decay"])
    else:
        values = formulas.ema_of_steps(window.steps(), given["step_decay"])
    return [_row_with_a_past(values, window)]


def _power(given: Given, window: Window) -> list[CoefficientRow]:
    times, unit = window.times() or (window.steps(), "step")  # which refuses, naming a checkpoint
    if unit == "epoch" and 0 in window.positions.epochs:  # counted from 0
        times = [epoch + 1 for epoch in times]
    return [_row_with_a_past(power_ema(times, given["sigma"]), window)]


def _row_with_a_past(values: list[float], window: Window) -> CoefficientRow:
    """Point out where the first snapshot, which stands for all before it, has most weight."""
    row = window.row(values)
    if len(window) > 1 and values[0] > 0.5:
        window.note(
            f"gives {100 * values[0]:.0f}% of the weight to {window.labels[0]}, which stands for "
            "all training before it"
        )
    return row


def _wsm(given: Given, window: Window) -> list[CoefficientRow]:
    found = window.times()
    if found is None:
        window.note("takes the checkpoints as evenly spaced: their training steps are not known")
    times = list(range(len(window))) if found is None else found[0]
    decay = given["decay"]
    final = given.get("final", _DEFAULT_FINAL if decay in NEVER_ZERO else 0.0)
    return [window.row(merged_decay(times, decay, final))]


def _check_wsm(given: Given) -> None:
    if given["decay"] in NEVER_ZERO and given.get("final") == 0:
        raise ValueError(f"final must be above 0: decay={given['decay']} never ends at 0")


def _explicit(given: Given, window: Window) -> list[CoefficientRow]:
    values = given["coefficients"]
    total = math.fsum(values)
    if abs(total - 1) > _SUM_TOLERANCE:
        raise UsageError(
            f"the coefficients sum to {total:.9g}, not 1; divide each of them by their sum"
            if total
            else "the coefficients sum to 0, not 1"
        )
    return [window.row(values)]


def _phema(given: Given, window: Window) -> list[CoefficientRow]:
    steps, sigmas = window.steps(increasing=False), window.sigmas(given.get("stored"))
    if 0 in steps:
        raise window.refusal(f"{window.labels[steps.index(0)]} is of step 0, where no average is")
    try:
        fit = fit_power_ema(steps, sigmas, given["sigma"])
    except UsageError as error:
        raise window.refusal(str(error)) from error
    window.note(
        f"reaches the profile of sigma {given['sigma']:.4g} at step {max(steps)} with a relative "
        f"error of {fit.error:.2g} (L2), from stored averages of sigma "
        f"{', '.join(f'{one:.4g}' for one in sorted(set(sigmas)))}"
    )
    return [window.row(fit.coefficients)]


def _unaverage(given: Given, window: Window) -> list[CoefficientRow]:
    if len(window) != 2:
        raise window.refusal(f"takes two checkpoints, an older and a newer average, not "
                             f"{len(window)}; last=2 takes the newest two")  # fmt: skip
    if "counts" in given:
        return [window.row(formulas.mean_between(*given["counts"]))]
    if "step_decay" in given:
        older, newer = window.steps()
        return [window.row(formulas.ema_between(given["step_decay"], newer - older))]
    return [window.row(formulas.ema_between(given["decay"], given["updates"]))]


def _check_unaverage(given: Given) -> None:
    forms = [{"counts"}, {"step_decay"}, {"decay", "updates"}]
    own = {name for form in forms for name in form if name in given}
    if own not in forms:
        raise ValueError("takes counts=M/N, or step-decay=B, or decay=D with updates=U")
    if "counts" in given and given["counts"][0] >= given["counts"][1]:
        raise ValueError("counts=M/N: the newer average, N, has to be of more than M iterates")


def _check_ema(given: Given) -> None:
    if ("decay" in given) == ("step_decay" in given):
        raise ValueError("takes decay=D (over snapshots) or step-decay=B (per training step)")


def _median(given: Given, window: Window) -> list[CoefficientRow]:
    return [_trimmed_row((len(window) - 1) // 2, window)]


def _trimmed(given: Given, window: Window) -> list[CoefficientRow]:
    n = len(window)
    n_cut = min(math.floor(given["fraction"] * n + _FRACTION_ROUNDING), (n - 1) // 2)
    if n_cut == 0:
        window.note(f"cuts nothing from {n} checkpoints: it is their mean")
    return [_trimmed_row(n_cut, window)]


def _trimmed_row(n_cut: int, window: Window) -> CoefficientRow:
    ones = [1.0] * len(window)
    return window.statistic_row(ones, Trimmed(n_cut)) if n_cut else window.row(ones)


def _swag(given: Given, window: Window) -> list[CoefficientRow]:
    n = len(window)
    rank = given.get("rank", min(_DEFAULT_RANK, n))
    if n < 2:
        raise window.refusal("takes at least 2 checkpoints: one has no spread")
    if rank > n:
        raise window.refusal(f"there are only {n} checkpoints, too few for rank={rank}")
    seed, scale = given.get("seed", _DEFAULT_SEED), given.get("scale", _DEFAULT_SCALE)
    return [
        window.statistic_row(
            formulas.swag_means(n, rank, seed, sample, scale),
            GaussianNoise(tuple(sorted(window.indices)), scale / math.sqrt(2), seed, sample),
        )
        for sample in range(1, given.get("samples", DEFAULT_SAMPLES) + 1)
    ]


_KINDS = (
    SchemeKind(
        "uniform", "the mean of all (SWA); that of the last N is LAWA", _uniform,
        example="uniform:last=10",
    ),
    SchemeKind(
        "linear", "weighted by recency, 1, 2, 3, ... (WMA)", _linear, example="linear:last=10"
    ),
    SchemeKind(
        "ema", "exponential moving average: over checkpoints, or with a decay per training step",
        _ema, (Option("decay", _DECAY), Option("step-decay", _DECAY)),
        "decay=D or step-decay=B", "ema:decay=0.9", check=_check_ema,
    ),
    SchemeKind(
        "power", "power-function EMA (EDM2) whose width is the share S of the training", _power,
        (Option("sigma", _SIGMA, required=True),), "sigma=S, at most 0.288", "power:sigma=0.1",
    ),
    SchemeKind(
        "wsm", "merging as a learning-rate decay to the share F of the peak (0; the last two: 0.1)",
        _wsm,
        (
            Option("decay", Word(DECAYS), required=True),
            Option("final", Real(0, 1, with_low=True)),
        ),
        f"decay={'|'.join(DECAYS)} final=F", "wsm:decay=cosine", check=_check_wsm,
    ),
    SchemeKind(
        "coefficients", "one number a checkpoint, in the order typed; they sum to 1", _explicit,
        (
            Option("coefficients", Several(Real(-math.inf, math.inf), ",", "0.2,0.3,0.5"),
                   required=True, per_source=True),
        ),
        "a,b,c, also 1/3", "coefficients:0.2,0.3,0.5", has_window=False, positional=True,
    ),
    SchemeKind(
        "phema", "power-function EMA put together from stored ones (EDM2, post hoc)", _phema,
        (
            Option("sigma", _SIGMA, required=True),
            Option("stored", Several(_SIGMA, "/", "0.05 or 0.05/0.1"), per_source=True),
        ),
        "sigma=S stored=S1/S2/... (default: by their names)", "phema:sigma=0.15,stored=0.05",
        one_step_each=False,
    ),
    SchemeKind(
        "unaverage", "what lies between two averages of one run, an older and a newer one",
        _unaverage,
        (
            Option("counts", Several(Whole(), "/", "100/200", count=2)),
            Option("step-decay", _DECAY),
            Option("decay", _DECAY),
            Option("updates", Whole()),
        ),
        "counts=M/N or step-decay=B or decay=D updates=U", "unaverage:counts=100/200",
        check=_check_unaverage,
    ),
    SchemeKind("median", "the median of every value", _median, example="median:last=9"),
    SchemeKind(
        "trimmed", "the mean of every value without the share F at each end", _trimmed,
        (Option("fraction", Real(0, 0.5, with_low=True), required=True),), "fraction=F",
        "trimmed:fraction=0.2",
    ),
    SchemeKind(
        "swag", "M samples around the mean, spread as the checkpoints are (SWAG)", _swag,
        (
            Option("rank", Whole(2)),
            Option("samples", Whole(1, 1000)),
            Option("seed", Whole(0)),
            Option("scale", Real(0, math.inf)),
        ),
        f"rank=K ({_DEFAULT_RANK}) samples=M ({DEFAULT_SAMPLES}) seed=N ({_DEFAULT_SEED}) "
        f"scale=X ({_DEFAULT_SCALE:g})",
        "swag:samples=30",
    ),
)  # fmt: skip

_BY_NAME = {kind.name: kind for kind in _KINDS}


def list_schemes() -> tuple[SchemeKind, ...]:
    """Return the schemes there are, with what ``--list-schemes`` tells of them."""
    return _KINDS


def kind_named(name: object) -> SchemeKind:
    """Return the scheme of a name.

    Raises:
        UsageError: If there is none; it says which name is near.
    """
    kind = _BY_NAME.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UsageError(f"scheme '{name}' is not known; {meant(str(name), _BY_NAME)}")
    return kind


def meant(text: str, there_are: Collection[str]) -> str:
    """Return ``did you mean x?``, or all there is where nothing is near."""
    near = difflib.get_close_matches(text, there_are, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(there_are)}"
