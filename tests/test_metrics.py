"""Which metrics get better by falling, and which of two values wins."""

import math

import pytest
from hostile import whole

from ckptavg.errors import SourceError, UsageError
from ckptavg.metrics import Mode, best_mode, is_better, known_metric

NAN = math.nan


@pytest.mark.parametrize(
    "name",
    [
        "loss", "eval_loss", "val/loss", "valLoss", "valloss", "nll", "test_nll", "perplexity",
        "ppl", "error", "top1_error", "val_err", "err5", "mse", "RMSE", "wer", "val_cer", "FID",
        "bpb", "f1_loss", "validation loss", "cross_entropy", "mae",
    ],
)  # fmt: skip
def test_of_losses_and_errors_less_is_better(name: str) -> None:
    assert best_mode(name) == "min"


@pytest.mark.parametrize(
    "name",
    [
        "accuracy", "eval_accuracy", "acc", "val_acc1", "acc@1", "testaccuracy", "f1", "eval_f1",
        "macroF1", "auc", "bleu", "rougeL", "rouge2", "mIoU", "mAP50", "map", "top1", "eval_top5",
        "recall", "precision@5", "r2", "em", "score",
    ],
)  # fmt: skip
def test_of_accuracies_and_scores_more_is_better(name: str) -> None:
    assert best_mode(name) == "max"


@pytest.mark.parametrize(
    "name",
    ["metric", "lr", "epoch", "neg_mean_squared_error", "tempo", "permute", "r", "f", "top"],
)  # fmt: skip
def test_other_names_do_not_tell(name: str) -> None:
    message = (
        f"the name '{name}' does not tell whether less or more is better: pass --mode min or "
        "--mode max"
    )
    with pytest.raises(UsageError, match=whole(message)):
        best_mode(name)


def test_a_mode_that_is_given_wins_over_the_name() -> None:
    assert best_mode("loss", "max") == "max"
    assert best_mode("metric", "min") == "min"
    with pytest.raises(UsageError, match=whole("mode is 'less', expected min or max")):
        best_mode("loss", "less")


def test_nan_never_wins() -> None:
    assert is_better(1, 2, "min")
    assert is_better(2, 1, "max")
    assert not is_better(2, 1, "min")
    assert not is_better(1, 1, "min")
    assert not is_better(1, 1, "max")
    modes: tuple[Mode, ...] = ("min", "max")
    for mode in modes:
        assert not is_better(NAN, 1, mode)
        assert not is_better(NAN, NAN, mode)
        assert is_better(1, NAN, mode)


def test_an_unknown_metric_is_refused_with_those_that_are_there() -> None:
    assert known_metric("loss", ["acc", "loss"]) == "loss"
    for there, message in (
        ([], "no metric 'los': no metrics are there"),
        (["loss"], "no metric 'los': there is loss; did you mean loss?"),
        (["acc", "f1"], "no metric 'los': there are acc, f1"),
        ([f"m{n}" for n in range(14)],
         f"no metric 'los': there are {', '.join(f'm{n}' for n in range(12))} and 2 more"),
    ):  # fmt: skip
        with pytest.raises(SourceError, match=whole(message)):
            known_metric("los", there)
