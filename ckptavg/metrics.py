"""Metrics by name: whether less or more is better, which of two values is, and which is meant."""

import difflib
import math
import re
from collections.abc import Iterable
from typing import Literal, get_args

from ckptavg.errors import SourceError, UsageError

Mode = Literal["min", "max"]

# as parts of a name, however it is put together: val_loss, valLoss, eval/top1, bits_per_byte
_MIN_WORDS = frozenset(
    {
        "loss", "nll", "perplexity", "ppl", "error", "err", "mse", "mae", "rmse", "wer", "cer",
        "fid", "bpb", "bpc", "entropy", "brier", "ece",
    }
)  # fmt: skip
_MAX_WORDS = frozenset(
    {
        "acc", "accuracy", "f", "auc", "auroc", "bleu", "rouge", "iou", "miou", "map", "top",
        "recall", "precision", "r", "em", "score", "dice", "psnr", "ssim", "ndcg", "mrr",
    }
)  # fmt: skip
_NUMBERED_ONLY = frozenset({"f", "r", "top"})  # f1, r2, top5
_INSIDE = ("loss", "perplexity", "accuracy")  # of words run together: valloss, testaccuracy
_NEGATED = frozenset({"neg", "negative", "minus"})  # scikit-learn's neg_mean_squared_error
# valLoss in two words, then mIoU and mAP50 in one
_WORDS = (re.compile(r"([A-Z]+(?![a-z])|[A-Z]?[a-z]+)(\d*)"), re.compile(r"([A-Za-z]+)(\d*)"))
_MAX_LISTED = 12


def best_mode(name: str, mode: str | None = None) -> Mode:
    """Return whether less or more of a metric is better.

    Args:
        name: Of the metric, such as ``eval_loss``; its words decide where ``mode`` does not.
        mode: ``min`` or ``max``, if it was given.

    Raises:
        UsageError: If the mode is another one, or the name does not tell.
    """
    if mode is not None:
        for known in get_args(Mode):
            if mode == known:
                return known  # type: ignore[no-any-return]  # one of Mode's own values
        raise UsageError(f"mode is '{mode}', expected min or max")
    words: set[str] = set()
    for word, number in (found for pattern in _WORDS for found in pattern.findall(name)):
        lower = word.lower()
        if number or lower not in _NUMBERED_ONLY:
            words.add(lower)
        words.update(inner for inner in _INSIDE if inner in lower)
    is_negated = bool(words & _NEGATED)
    if words & _MIN_WORDS and not is_negated:  # top1_error, f1_loss: the error of something
        return "min"
    if words & _MAX_WORDS and not is_negated:
        return "max"
    raise UsageError(
        f"the name '{name}' does not tell whether less or more is better: pass --mode min or "
        "--mode max"
    )


def is_better(one: float, other: float, mode: Mode) -> bool:
    """Tell whether a value is better than another; NaN never is, and any number beats it."""
    if math.isnan(one):
        return False
    if math.isnan(other):
        return True
    return one < other if mode == "min" else one > other


def known_metric(name: str, there: Iterable[str]) -> str:
    """Return the name of a metric, if it is among those that are there.

    Raises:
        SourceError: If it is not; the message lists those that are.
    """
    names = list(dict.fromkeys(there))
    if name in names:
        return name
    if not names:
        raise SourceError(f"no metric '{name}': no metrics are there")
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    raise SourceError(
        f"no metric '{name}': there {'is' if len(names) == 1 else 'are'} "
        f"{', '.join(names[:_MAX_LISTED])}{more}{hint}"
    )
