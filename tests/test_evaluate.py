"""The user's metric: what it may return, and the state of the model while it runs and after."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ckptavg import ModelError
from ckptavg.evaluate import evaluated


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def returning(value: Any) -> Callable[[nn.Module], Any]:
    return lambda model: value


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


# ---- what it may return --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (-0.25, -0.25),
        (True, 1.0),
        (False, 0.0),
        (Fraction(1, 4), 0.25),
        (np.float64(0.25), 0.25),
        (np.float32(0.25), 0.25),
        (np.float16(0.25), 0.25),
        (np.int64(-7), -7.0),
        (np.uint8(200), 200.0),
        (torch.tensor(0.25), 0.25),
        (torch.tensor(0.25, dtype=torch.bfloat16), 0.25),
        (torch.tensor(7), 7.0),
        (torch.tensor(True), 1.0),
        (torch.tensor([[0.25]]), 0.25),
        (torch.tensor(0.25, requires_grad=True), 0.25),
        (nn.Parameter(torch.tensor([0.25])), 0.25),
    ],
)
def test_a_number_of_any_kind_is_the_metric(value: object, number: float) -> None:
    found = evaluated(net(), returning(value))
    assert found == {"metric": number}
    assert type(found["metric"]) is float


@pytest.mark.parametrize("kind", [dict, OrderedDict, MappingProxyType])
def test_several_metrics_keep_their_names_and_order(
    kind: Callable[[dict[str, Any]], Mapping[str, Any]],
) -> None:
    value = kind({"top-5": torch.tensor(0.75), "accuracy": np.float32(0.5), "correct": 3})
    found = evaluated(net(), returning(value))
    assert list(found.items()) == [("top-5", 0.75), ("accuracy", 0.5), ("correct", 3.0)]
    assert {type(one) for one in found.values()} == {float}


def test_names_that_are_no_text_become_text() -> None:
    assert evaluated(net(), returning({5: 0.5, None: 1})) == {"5": 0.5, "None": 1.0}


def test_a_metric_need_not_be_finite() -> None:
    found = evaluated(net(), returning({"loss": math.inf, "gain": torch.tensor(-math.inf)}))
    assert found == {"loss": math.inf, "gain": -math.inf}
    assert math.isnan(evaluated(net(), returning(math.nan))["metric"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "a NoneType for 'metric'"),
        ("0.5", "a str for 'metric'"),
        ([0.5], "a list for 'metric'"),
        ((0.5, 0.25), "a tuple for 'metric'"),
        (1j, "a complex for 'metric'"),
        (torch.tensor(1j), "a complex for 'metric'"),
        (torch.zeros(2), "a Tensor for 'metric'"),
        (torch.zeros(0), "a Tensor for 'metric'"),
        ({"accuracy": 0.5, "loss": None}, "a NoneType for 'loss'"),
        ({"accuracy": {"top-1": 0.5}}, "a dict for 'accuracy'"),
        ({"per class": torch.ones(3)}, "a Tensor for 'per class'"),
    ],
)
def test_anything_else_is_refused_by_its_name(value: object, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        evaluated(net(), returning(value))
    assert str(caught.value) == f"the evaluation returned {message}, expected a number"


def test_no_metric_at_all_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        evaluated(net(), returning({}))
    assert str(caught.value) == "the evaluation returned no metric"


# ---- the state of the model ----------------------------------------------------------------------


def test_it_runs_on_the_model_itself_in_evaluation_mode_without_gradients() -> None:
    model, seen = net(), list[object]()

    def evaluate(given: nn.Module) -> float:
        seen.append(given)
        seen.append(any(modes(given).values()))
        seen.append(given(torch.ones(2, 3)).requires_grad)
        return 0.0

    evaluated(model, evaluate)
    assert seen == [model, False, False]
    assert model(torch.ones(2, 3)).requires_grad


def partly_frozen() -> nn.Sequential:
    model = net().train()
    model[1].eval()
    return model


def in_evaluation_mode() -> nn.Sequential:
    model = net().eval()
    model[2].train()
    return model


def train(model: nn.Module) -> float:
    model.train()
    return 0.0


def freeze_and_fail(model: nn.Module) -> float:
    model[0].train()  # type: ignore[index]  # a Sequential
    raise ValueError("no test set")


def interrupt(model: nn.Module) -> float:
    raise KeyboardInterrupt


def no_number(model: nn.Module) -> Any:
    return "good"


@pytest.mark.parametrize("make", [net, partly_frozen, in_evaluation_mode])
@pytest.mark.parametrize(
    ("evaluate", "error"),
    [
        (returning(0.5), None),
        (train, None),
        (freeze_and_fail, ValueError),
        (interrupt, KeyboardInterrupt),
        (no_number, ModelError),
    ],
)
def test_every_module_is_in_its_mode_afterwards_whatever_happens(
    make: Callable[[], nn.Module],
    evaluate: Callable[[nn.Module], Any],
    error: type[BaseException] | None,
) -> None:
    model = make()
    before = modes(model)
    if error is None:
        evaluated(model, evaluate)
    else:
        with pytest.raises(error):
            evaluated(model, evaluate)
    assert modes(model) == before
    assert torch.is_grad_enabled()


class NeverTrains(nn.BatchNorm1d):
    """A layer as detectors freeze it, by overriding ``train``."""

    def train(self, mode: bool = True) -> "NeverTrains":
        super().train(False)
        return self


class Merges(nn.Linear):
    """A layer as of LoRA: ``eval`` and ``train`` change its weights."""

    def train(self, mode: bool = True) -> "Merges":
        super().train(mode)
        with torch.no_grad():
            self.weight.mul_(2 if mode else 3)
        return self


def test_modes_are_set_and_put_back_by_attribute() -> None:
    model = nn.Sequential(Merges(3, 4), NeverTrains(4))
    model[1].training = True
    before, weight = modes(model), model.state_dict()["0.weight"].clone()
    seen: list[dict[str, bool]] = []

    def evaluate(given: nn.Module) -> float:
        seen.append(modes(given))
        return 0.5

    evaluated(model, evaluate)
    assert seen == [dict.fromkeys(before, False)]
    assert modes(model) == before
    assert torch.equal(model.state_dict()["0.weight"], weight)
