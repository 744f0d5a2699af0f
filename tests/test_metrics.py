"""Which metrics get better by falling, and which of two values wins."""

import math

import pytest
from hostile import whole

from ckptavg.errors import UsageError
from ckptavg.metrics import Mode, best_mode, chosen_metric, is_better

NAN = math.nan


@pytest.mark.parametrize(
    "name",
    [
        "loss", "eval_loss", "val/loss", "valLoss", "nll", "test_nll", "perplexity", "ppl", "error",
        "val_err", "mse", "RMSE", "wer", "val_cer", "FID", "bpb", "validation loss", "mae",
    ],
)  # fmt: skip
def test_of_losses_and_errors_less_is_better(name: str) -> None:
    assert best_mode(name) == "min"


@pytest.mark.parametrize(
    "name",
    [
        "accuracy", "eval_accuracy", "acc", "val_acc1", "acc@1", "f1", "eval_f1", "auc", "bleu",
        "rougeL", "rouge2", "miou", "map", "top1", "eval_top5", "recall", "precision@5", "r2", "em",
        "score",
    ],
)  # fmt: skip
def test_of_accuracies_and_scores_more_is_better(name: str) -> None:
    assert best_mode(name) == "max"


@pytest.mark.parametrize("name", ["metric", "lr", "epoch", "tempo", "permute"])
def test_other_names_do_not_tell(name: str) -> None:
    message = (
        f"whether '{name}' is best when small or when large, its name does not tell; say it with "
        "--mode min or --mode max"
    )
    with pytest.raises(UsageError, match=whole(message)):
        best_mode(name)


def test_a_mode_that_is_given_wins_over_the_name() -> None:
    assert best_mode("loss", "max") == "max"
    assert best_mode("metric", "min") == "min"
    with pytest.raises(UsageError, match=whole("mode is 'less', expected min or max")):
        best_mode("loss", "less")  # type: ignore[arg-type]  # callers without types do


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
    assert chosen_metric(["acc", "loss"], "loss") == "loss"
    assert chosen_metric(["loss"], None) == "loss"
    for there, message in (
        ([], "there is no metric 'los': none is on record"),
        (["loss", "acc"], "there is no metric 'los', but loss, acc; did you mean 'loss'?"),
        (["acc", "f1"], "there is no metric 'los', but acc, f1"),
    ):
        with pytest.raises(UsageError, match=whole(message)):
            chosen_metric(there, "los")
