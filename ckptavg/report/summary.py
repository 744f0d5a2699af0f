"""A model at one glance: what it is, and what averaging brought."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptavg.errors import UsageError
from ckptavg.metrics import Mode, best_mode
from ckptavg.report.figures import counted, finite, number, span
from ckptavg.report.markup import Html, element, paragraph
from ckptavg.units import size

_MOST_TILES = 3
_LONG, _LONGEST = 20, 40  # characters that are written smaller, that are written at all
_COUNTER = "num_batches_tracked"  # what only layers with statistics have


@dataclass(frozen=True)
class Gain:
    """A metric of a model, beside that of a checkpoint by itself.

    Attributes:
        metric: Its name.
        value: Of the model.
        control: Name of what it is compared with; None if there is nothing.
        control_value: Its value.
        mode: Which is better; None where that is not known.
    """

    metric: str
    value: object
    control: str | None
    control_value: object
    mode: Mode | None

    @property
    def words(self) -> str:
        """Say how much better or worse the model is."""
        value, against = finite(self.value), finite(self.control_value)
        if self.control is None:
            return ""
        if value is None or against is None:
            return f"{self.control}: {number(self.control_value)}"
        difference = value - against
        if difference == 0:
            return f"as good as the {self.control}"
        if self.mode is None:
            sign = "+" if difference > 0 else ""
            amount = f"{sign}{number(difference, 4)} against"
        else:
            is_better = (difference > 0) == (self.mode == "max")
            amount = f"{number(abs(difference), 4)} {'better' if is_better else 'worse'} than"
        return f"{amount} the {self.control} ({number(self.control_value)})"


def modes(told: Mapping[str, Any]) -> dict[str, Mode]:
    """Return what a search says is better, by metric."""
    if told["mode"] not in ("min", "max"):
        raise ValueError(told["mode"])
    return {str(told["metric"]): "min" if told["mode"] == "min" else "max"}


def mode_of(metric: str, known: Mapping[str, Mode]) -> Mode | None:
    """Return what is better of a metric; None where neither a search nor its name tells."""
    try:
        return known.get(metric) or best_mode(metric)
    except UsageError:
        return None


def gains(told: Mapping[str, Any], known: Mapping[str, Mode]) -> list[Gain]:
    """Return the metrics of a model, those that a search went by first.

    It is compared with the last checkpoint, which has a BatchNorm pass of its own if the model had
    one: averaging gets no credit for the pass.
    """
    metrics = told.get("metrics") or {}
    rows = {row["name"]: row["metrics"] for row in told.get("comparison") or ()}
    wanted = ["last checkpoint + BN pass"] * bool(has_pass(told)) + ["last checkpoint"]
    control = next((name for name in wanted if name in rows), None)
    found = []
    for name in sorted(metrics, key=lambda name: name not in known):
        against = rows[control].get(name) if control is not None else None
        has_control = control is not None and name in rows[control]
        found.append(
            Gain(
                name, metrics[name], control if has_control else None, against,
                mode_of(name, known),
            )
        )  # fmt: skip
    return found


def has_pass(told: Mapping[str, Any]) -> bool:
    """Tell whether BatchNorm statistics were recomputed."""
    batchnorm = told.get("batchnorm")
    return bool(batchnorm and batchnorm["layers"])


def has_statistics(told: Mapping[str, Any]) -> bool:
    """Tell whether the model has BatchNorm statistics, as the names of its tensors say."""
    return any(str(name).endswith(_COUNTER) for name in told["tensors"]["copied"])


def when(told: Mapping[str, Any]) -> str:
    """Return the steps of the checkpoints, or else the epochs; empty if neither is known."""
    checkpoints = told["checkpoints"]
    for noun in ("step", "epoch"):
        text = span([one.get(noun) for one in checkpoints], noun)
        if text:
            return text
    return ""


def lead(told: Mapping[str, Any]) -> str:
    """Say in a sentence what a model is."""
    checkpoints = told["checkpoints"]
    which = when(told)
    of = counted(len(checkpoints), "checkpoint") + (f" ({which})" if which else "")
    if len(checkpoints) == 1:
        again = checkpoints[0].get("made_by_ckptavg")
        what = "An average that was made before" if again else "One checkpoint"
        what += f" ({which})" if which else ""
    else:
        what = f"{_operation(told)} of {of}"
    if has_pass(told):
        samples = counted(told["batchnorm"]["n_samples"], "sample")
        what += f", with BatchNorm statistics recomputed over {samples}"
    return f"{what}."


def _operation(told: Mapping[str, Any]) -> str:
    statistic = told.get("statistic")
    values = [one["coefficient"] for one in told["checkpoints"]]
    if statistic and None in values:
        name = str(statistic["name"])
        return f"The {name}" if name == "median" else f"The mean, {name},"
    mean = "The mean" if len(set(values)) == 1 else "The weighted mean"
    return f"{mean}, plus {statistic['name']}," if statistic else mean


def batchnorm_words(told: Mapping[str, Any]) -> str:
    """Say what became of BatchNorm statistics; empty if there are none."""
    if has_pass(told):
        return "recomputed"
    return "not recomputed" if has_statistics(told) else ""


def summary(told: Mapping[str, Any], known: Mapping[str, Mode]) -> Html:
    """Return the sentence and the tiles that a model begins with."""
    tiles = (_tile(*one) for one in _tiles(told, known))
    return Html(paragraph(lead(told), class_="lead") + element("dl", *tiles, class_="tiles") + "\n")


def _short_scheme(scheme: str) -> str:
    """Return a scheme, or its name alone where it holds many numbers; the page has all of it."""
    return scheme if len(scheme) <= _LONGEST else f"{scheme.partition(':')[0]}: …"


def _tile(term: object, value: object, more: object, kind: str = "") -> Html:
    return element(
        "div",
        element("dt", term),
        element("dd", value, class_="value long" if len(str(value)) > _LONG else "value"),
        *([element("dd", more)] if more else []),
        class_=f"tile {kind}".strip(),
    )


def _tiles(told: Mapping[str, Any], known: Mapping[str, Mode]) -> Iterator[tuple[str, ...]]:
    found = gains(told, known)
    for at, gain in enumerate(found[:_MOST_TILES]):
        yield gain.metric, number(gain.value), gain.words, "" if at else "main"
    yield "scheme", _short_scheme(str(told["scheme"])), ""
    n_given, n_used = told.get("n_sources"), len(told["checkpoints"])
    given = f"of {number(n_given)} given; " if n_given not in (None, n_used) else ""
    yield "checkpoints", number(n_used), f"{given}{when(told)}".removesuffix("; ")
    statistics = batchnorm_words(told)
    if has_pass(told):
        batchnorm = told["batchnorm"]
        layers = counted(len(batchnorm["layers"]), "layer")
        samples = counted(batchnorm["n_samples"], "sample")
        yield "BatchNorm statistics", statistics, f"{layers}, {samples}"
    elif statistics:
        yield "BatchNorm statistics", statistics, "averaged like the weights"
    made = told["output"]
    yield "weights", size(made["nbytes"]), str(made.get("format", ""))
