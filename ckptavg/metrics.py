"""Which metric decides, and whether more of it is better."""

import difflib
import math
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from ckptavg.errors import UsageError

Mode = Literal["min", "max"]
Key = TypeVar("Key", bound=Hashable)

_LOW = re.compile(
    r"loss|nll|perplexity|ppl|err(or)?s?|mse|mae|rmse|wer|cer|fid|bpb|bpc|ece|brier", re.IGNORECASE
)
_HIGH = re.compile(
    r"acc(uracy)?|acc\d|f1|f1score|auc|auroc|bleu|rouge\w*|iou|miou|map|recall|precision|r2|em"
    r"|score|reward|correct",
    re.IGNORECASE,
)
_HIGH_BY_ITSELF = re.compile(r"top\d|exact|match", re.IGNORECASE)  # not in top1_err

_TURNED = re.compile(r"neg(ative)?|minus|inv(erse)?", re.IGNORECASE)  # of scikit-learn


def best_mode(name: str, mode: Mode | None = None) -> Mode:
    """Return whether a metric is best when small or when large.

    By the words in its name (``eval_loss``, ``val/acc``) where ``mode`` does not say it.

    Raises:
        UsageError: If neither tells.
    """
    if mode is not None:
        if mode not in ("min", "max"):
            raise UsageError(f"mode is '{mode}', expected min or max")
        return mode
    words = re.split(r"[^a-zA-Z0-9]+", name)
    words += re.split(r"[^a-zA-Z0-9]+|(?<=[a-z])(?=[A-Z])", name)
    low, high = any(map(_LOW.fullmatch, words)), any(map(_HIGH.fullmatch, words))
    high = high or (not low and any(map(_HIGH_BY_ITSELF.fullmatch, words)))
    if low == high or any(map(_TURNED.fullmatch, words)):
        raise UsageError(
            f"whether '{name}' is best when small or when large, its name does not tell; say it "
            "with --mode min or --mode max"
        )
    return "min" if low else "max"


def badness(value: float, mode: Mode) -> tuple[bool, float]:
    """Return what sorts values, the best first: NaN is worse than everything else."""
    if math.isnan(value):
        return True, 0.0
    return False, value if mode == "min" else -value


def is_better(one: float, other: float, mode: Mode) -> bool:
    """Tell whether a value is better than another; NaN is worse than everything else."""
    return badness(one, mode) < badness(other, mode)


def chosen_metric(names: Iterable[str], metric: str | None) -> str:
    """Return the metric that decides: the one asked for, or the only one there is.

    Raises:
        UsageError: If it is not there, or there are several and none was asked for.
    """
    there = list(names)
    if metric is None:
        if len(there) == 1:
            return there[0]
        if not there:
            raise UsageError("no metric is on record")
        raise UsageError(f"which metric decides? Say it with --metric: {', '.join(there)}")
    if metric in there:
        return metric
    close = difflib.get_close_matches(metric, there, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    if not there:
        raise UsageError(f"there is no metric '{metric}': none is on record")
    raise UsageError(f"there is no metric '{metric}', but {', '.join(there)}{hint}")


@dataclass
class Judge:
    """Compares models by one of their metrics, which the first of them settles.

    Attributes:
        metric: Its name; None until there is one, where it is the only one.
        mode: Whether it is best when small or when large; None until its name has told.
    """

    metric: str | None = None
    mode: Mode | None = None

    def value(self, metrics: Mapping[str, float]) -> float:
        """Return what decides.

        Raises:
            UsageError: If the metric is not there, is one of several, or has no direction.
        """
        self.metric = chosen_metric(metrics, self.metric)
        self.mode = best_mode(self.metric, self.mode)
        return metrics[self.metric]

    @property
    def settled(self) -> tuple[str, Mode]:
        """Name and mode of the metric, once there was a value."""
        if self.metric is None or self.mode is None:
            raise AssertionError("nothing was judged yet")
        return self.metric, self.mode

    def badness(self, metrics: Mapping[str, float]) -> tuple[bool, float]:
        """Return what sorts models, the best first, and those without a number last.

        Raises:
            UsageError: As ``value`` does.
        """
        value = self.value(metrics)
        return badness(value, self.settled[1])

    def is_better(self, one: Mapping[str, float], other: Mapping[str, float]) -> bool:
        """Tell whether the first is really better."""
        value, against = self.value(one), self.value(other)
        return is_better(value, against, self.settled[1])

    def ranked(self, all_of: Mapping[Key, Mapping[str, float]]) -> list[Key]:
        """Return the keys of all, best first; equals stay in their order.

        Raises:
            UsageError: As ``value`` does.
        """
        return sorted(all_of, key=lambda key: self.badness(all_of[key]))

    def best(self, all_of: Mapping[Key, Mapping[str, float]]) -> Key:
        """Return the key of the best; of equals the first.

        Raises:
            UsageError: As ``value`` does.
        """
        return min(all_of, key=lambda key: self.badness(all_of[key]))
