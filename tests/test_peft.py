"""Averaged adapters, loaded by PEFT itself; runs where peft is installed."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ckptavg import IncompatibleCheckpointsError, average_checkpoints

peft = pytest.importorskip("peft")

Change = Callable[[int], dict[str, Any]]
TARGETS = ["embed", "conv", "blocks.0.fc", "blocks.1.fc"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT and its dependencies say is not of interest
        yield


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x)) + x


class Model(nn.Module):
    """An embedding, a convolution over pairs of tokens, two linear layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embed(tokens)[:, None])
        x = x.permute(0, 2, 1, 3).flatten(2)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x.mean(1))
        return out


def base_model() -> Model:
    torch.manual_seed(0)
    return Model()


def trained_adapters(
    tmp_path: Path, change: Change = lambda n: {}, n: int = 3, steps: int = 6, **save: Any
) -> list[Path]:
    """Train one adapter after the other a few steps and save each."""
    paths = []
    for number in range(n):
        told = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **change(number)}
        base = base_model()
        torch.manual_seed(number)
        model = peft.get_peft_model(base, peft.LoraConfig(**told))
        optimizer = torch.optim.SGD(
            [one for one in model.parameters() if one.requires_grad], lr=0.5
        )
        tokens, labels = torch.randint(30, (32, 5)), torch.randint(3, (32,))
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        paths.append(tmp_path / f"checkpoint-{number + 1}")
        model.save_pretrained(paths[-1], **save)
    return paths


def loaded(path: Path) -> Any:
    return peft.PeftModel.from_pretrained(base_model(), path).eval()


def weights64(path: Path) -> dict[str, Tensor]:
    """Return every parameter of the base model as the adapter makes it, in float64."""
    model = loaded(path).double().merge_and_unload()
    return {name: value.detach() for name, value in model.named_parameters()}


def mean(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in states]).mean(0) for name in states[0]}


def model_of(state: dict[str, Tensor]) -> Model:
    model = base_model().double()
    model.load_state_dict(state)
    return model.eval()


CASES: dict[str, Change] = {
    "plain": lambda n: {},
    "rslora": lambda n: {"use_rslora": True},
    "rslora in one": lambda n: {"use_rslora": n == 1},
    "patterns": lambda n: {
        "rank_pattern": {"blocks.1.fc": 6, "^conv": 2},
        "alpha_pattern": {r"blocks\.\d\.fc": 3},
    },
    "ranks": lambda n: {"r": 2 + n},
    "ranks at one scale": lambda n: {"r": 2 + n, "lora_alpha": 4 + 2 * n},
    "alphas": lambda n: {"lora_alpha": 4 + n},
    "modules to save": lambda n: {"modules_to_save": ["head"]},
    "biases": lambda n: {"bias": "lora_only"},
    "bias of B": lambda n: {"lora_bias": True, "target_modules": TARGETS[1:]},
    "gaussian": lambda n: {"init_lora_weights": "gaussian"},
    "orthogonal": lambda n: {"init_lora_weights": "orthogonal", "target_modules": TARGETS[2:]},
    "regular expression": lambda n: {"target_modules": r".*\.fc"},
}


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_peft_loads_the_mean_of_the_weights(tmp_path: Path, case: str, safe: bool) -> None:
    paths = trained_adapters(tmp_path, CASES[case], safe_serialization=safe)
    average_checkpoints(paths, tmp_path / "out")
    expected = mean([weights64(path) for path in paths])
    found = weights64(tmp_path / "out")
    base = dict(base_model().double().named_parameters())
    changed = 0
    for name, value in expected.items():
        delta = value - base[name]
        error = (found[name] - value).norm()
        assert error <= 2**-22 * max(delta.norm(), 2**-24 * value.norm()), name
        changed += int(delta.norm() > 1e-4)
    assert changed >= 2
    tokens = torch.randint(30, (16, 5))
    torch.testing.assert_close(
        loaded(tmp_path / "out")(tokens).double(), model_of(expected)(tokens), rtol=1e-5, atol=1e-5
    )


def test_a_chosen_rank_is_near_the_mean(tmp_path: Path) -> None:
    """Adapters that begin alike have a mean of low rank."""

    def change(n: int) -> dict[str, Any]:
        return {"modules_to_save": ["head"]}

    paths = trained_adapters(tmp_path, change)
    result = average_checkpoints(paths, tmp_path / "out", adapter_rank=6)
    report = result.outputs[0].adapter
    assert report is not None
    assert report.error is not None
    expected = mean([weights64(path) for path in paths])
    found = weights64(tmp_path / "out")
    base = dict(base_model().double().named_parameters())
    adapted = [f"{name}.weight" for name in TARGETS]
    left = sum(float((found[name] - expected[name]).norm() ** 2) for name in adapted)
    total = sum(float((expected[name] - base[name]).norm() ** 2) for name in adapted)
    assert (left / total) ** 0.5 == pytest.approx(report.error, rel=1e-3, abs=1e-7)
    assert loaded(tmp_path / "out").peft_config["default"].r == 6


def test_factors_are_off_by_what_was_measured(tmp_path: Path) -> None:
    paths = trained_adapters(tmp_path)
    result = average_checkpoints(paths, tmp_path / "out", adapter_factors=True)
    report = result.outputs[0].adapter
    assert report is not None
    assert report.error is not None
    expected = mean([weights64(path) for path in paths])
    found = weights64(tmp_path / "out")
    base = dict(base_model().double().named_parameters())
    left = sum(float((found[name] - expected[name]).norm() ** 2) for name in expected)
    total = sum(float((expected[name] - base[name]).norm() ** 2) for name in expected)
    assert (left / total) ** 0.5 == pytest.approx(report.error, rel=1e-3)
    assert report.error > 0.05


def test_dora_is_refused(tmp_path: Path) -> None:
    paths = trained_adapters(tmp_path, lambda n: {"use_dora": True, "target_modules": r".*\.fc"})
    with pytest.raises(IncompatibleCheckpointsError, match=r"use_dora \(DoRA\), which is not"):
        average_checkpoints(paths, tmp_path / "out")
    average_checkpoints(paths, tmp_path / "factors", adapter_factors=True)
    loaded(tmp_path / "factors")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_changes_the_base_model_keeps_its_rank(tmp_path: Path, init: str) -> None:
    """PiSSA takes the beginning of the factors out of the base at every load, by the rank."""
    paths = trained_adapters(
        tmp_path, lambda n: {"init_lora_weights": init, "target_modules": r".*\.fc"}, steps=2
    )
    with pytest.raises(IncompatibleCheckpointsError, match="changes the base model"):
        average_checkpoints(paths, tmp_path / "out")
    result = average_checkpoints(paths, tmp_path / "out", adapter_rank=4)
    report = result.outputs[0].adapter
    assert report is not None
    assert report.error is not None
    expected = mean([weights64(path) for path in paths])
    found = weights64(tmp_path / "out")
    left = total = 0.0
    for name in ("blocks.0.fc", "blocks.1.fc"):
        left += float((found[f"{name}.weight"] - expected[f"{name}.weight"]).norm() ** 2)
        deltas = [loaded(path).get_submodule(f"base_model.model.{name}") for path in paths]
        product = torch.stack([one.double().get_delta_weight("default") for one in deltas]).mean(0)
        total += float(product.norm() ** 2)
    assert (left / total) ** 0.5 == pytest.approx(report.error, rel=1e-3, abs=1e-6)
    assert report.error < 0.2


def test_other_methods_are_refused_or_averaged_as_they_are(tmp_path: Path) -> None:
    paths = []
    for number in range(2):
        base = base_model()
        torch.manual_seed(number)
        model = peft.get_peft_model(
            base,
            peft.IA3Config(
                target_modules=r".*\.fc", feedforward_modules=[], init_ia3_weights=False
            ),
        )
        paths.append(tmp_path / f"ia3-{number}")
        model.save_pretrained(paths[-1])
    average_checkpoints(paths, tmp_path / "ia3")
    expected = mean([weights64(path) for path in paths])
    found = weights64(tmp_path / "ia3")
    for name, value in expected.items():  # linear: the mean of the scaled weights
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    paths = []
    for number in range(2):
        model = peft.get_peft_model(
            base_model(), peft.LoHaConfig(target_modules=r".*\.fc", init_weights=False)
        )
        paths.append(tmp_path / f"loha-{number}")
        model.save_pretrained(paths[-1])
    with pytest.raises(IncompatibleCheckpointsError, match="is an adapter with LOHA"):
        average_checkpoints(paths, tmp_path / "loha")


def test_training_can_go_on(tmp_path: Path) -> None:
    paths = trained_adapters(tmp_path)
    average_checkpoints(paths, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(base_model(), tmp_path / "out", is_trainable=True)
    before = copy.deepcopy(model.state_dict())
    model(torch.randint(30, (4, 5))).sum().backward()
    torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1).step()
    moved = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    assert moved
    assert all("lora_" in name for name in moved)


def test_attention_shares_one_entry_between_its_two_modules(tmp_path: Path) -> None:
    """PEFT gives the output projection inside the rank and the alpha of the layer around it."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(12, 3, batch_first=True)
            self.out = nn.Linear(12, 3)

    def base() -> Attention:
        torch.manual_seed(0)
        return Attention()

    def weights(path: Path) -> dict[str, Tensor]:
        model = peft.PeftModel.from_pretrained(base(), path).double().merge_and_unload()
        return {name: value.detach() for name, value in model.named_parameters()}

    paths = []
    for number in range(2):
        model = base()
        torch.manual_seed(number)
        told = peft.LoraConfig(
            r=4, target_modules=["attn", "out"], rank_pattern={"attn": 2}, init_lora_weights=False
        )
        paths.append(tmp_path / f"{number}")
        peft.get_peft_model(model, told).save_pretrained(paths[-1])
    expected = mean([weights(path) for path in paths])
    average_checkpoints(paths, tmp_path / "exact")
    average_checkpoints(paths, tmp_path / "high", adapter_rank=30)
    for output in ("exact", "high"):
        found = weights(tmp_path / output)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
