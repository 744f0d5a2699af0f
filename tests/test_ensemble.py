"""Ensembles of checkpoints against the average of their weights: numbers, files, refusals."""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, tree
from landscape_fixtures import N_CLASSES, Net, State, drawn, labelled
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from ckptavg import (
    BnPass,
    EnsembleResult,
    IncompatibleCheckpointsError,
    LabelledEvaluation,
    Loader,
    MemoryBudgetError,
    ModelError,
    OutputError,
    Selection,
    SourceError,
    UsageError,
    average_checkpoints,
    ensemble,
)
from ckptavg.cli import run
from ckptavg.evaluate import evaluated

N_MEMBERS, N_BINS = 4, 15


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, N_CLASSES)
        self.register_buffer("counter", torch.zeros(2, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


TRAIN = [drawn(1, 40, 4) + 0.3, drawn(2, 24, 4) + 0.3]
TEST = labelled(3, 30, 30, 7)
VALIDATION = labelled(4, 21)


def save_run(
    folder: Path, model: Callable[[], nn.Module] = Net, layout: str = "safetensors"
) -> list[Path]:
    """Save checkpoints that lie around a centre."""
    paths = []
    for step in range(1, N_MEMBERS + 1):
        torch.manual_seed(0)
        built = model()
        state = built.state_dict()
        for number, (name, value) in enumerate(state.items()):
            if "counter" in name:
                value += step
            elif value.is_floating_point():
                noise = drawn(10 * step + number, *value.shape)
                value += 0.4 * (noise.abs() if name.endswith("var") else noise)
        paths.append(save_checkpoint(folder / f"step{step}", state, layout))
    return paths


def passes(model: Any = Net, batches: Any = TRAIN, **loaders: Any) -> BnPass:
    loaders = loaders or {"test": TEST}
    evaluation = LabelledEvaluation(
        loaders=[Loader(name=name, batches=found) for name, found in loaders.items()]
    )
    return BnPass(model=model, batches=batches, evaluate=evaluation)


def compared(folder: Path, evaluation: BnPass | None = None, **options: Any) -> EnsembleResult:
    sources = options.pop("sources", None) or save_run(folder)
    return ensemble(
        sources, folder / "out", evaluation=evaluation or passes(), **{"plot": False, **options}
    )


# ---- a straightforward reference -----------------------------------------------------------------


def recomputed(state: State) -> State:
    """Return a state with the BatchNorm statistics of the training data."""
    values = torch.cat(TRAIN) @ state["body.weight"].T + state["body.bias"]
    return {
        **state,
        "bn.running_mean": values.double().mean(0).float(),
        "bn.running_var": values.double().var(0).float(),
    }


def probabilities(state: State, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    model = Net()
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(torch.cat([inputs for inputs, _ in batches]))
    return logits.double().softmax(1)


def mean_state(states: Sequence[State]) -> State:
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(value.dtype)
        for name, value in states[0].items()
    }


def scores(found: Tensor, labels: Tensor) -> dict[str, Any]:
    confidence, guesses = found.max(1)
    right = (guesses == labels).double()
    ece = 0.0
    for number in range(N_BINS):
        inside = (confidence > number / N_BINS) & (confidence <= (number + 1) / N_BINS)
        if inside.any():
            gap = right[inside].mean() - confidence[inside].mean()
            ece += inside.double().mean().item() * abs(gap.item())
    accuracy = 100 * right.mean().item()
    return {
        "accuracy": pytest.approx(accuracy),
        "error": pytest.approx(100 - accuracy),
        "nll": pytest.approx(functional.nll_loss(found.log(), labels).item(), rel=1e-6),
        "ece": pytest.approx(100 * ece, rel=1e-5),
    }


def agreement(one: Tensor, other: Tensor) -> Any:
    return pytest.approx(100 * (one.argmax(1) == other.argmax(1)).double().mean().item())


def distance(one: Tensor, other: Tensor) -> Any:
    # members are kept in float32
    return pytest.approx((one - other).norm(dim=1).mean().item(), rel=1e-5, abs=1e-7)


# ---- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("members", ["stored", "recomputed"])
@pytest.mark.parametrize("order", ["oldest", "newest"])
def test_all_numbers_are_those_of_a_straightforward_computation(
    tmp_path: Path, members: Any, order: Any, device: str
) -> None:
    paths = save_run(tmp_path)
    found = compared(tmp_path, sources=paths, members=members, order=order, device=device)
    (one,) = found.loaders
    states = [load_file(path) for path in paths]
    if order == "newest":
        states, paths = states[::-1], paths[::-1]
    assert [member.source for member in found.members] == [str(path) for path in paths]
    labels = torch.cat([batch[1] for batch in TEST])
    as_run = states if members == "stored" else [recomputed(state) for state in states]
    single = [probabilities(state, TEST) for state in as_run]
    numbers = range(1, N_MEMBERS + 1)
    together = [torch.stack(single[:n]).mean(0) for n in numbers]
    averaged = [probabilities(recomputed(mean_state(states[:n])), TEST) for n in numbers]

    assert (one.name, one.n_labels, one.n_classes) == ("test", 67, N_CLASSES)
    assert [vars(found_scores) for found_scores in one.members] == [
        scores(p, labels) for p in single
    ]
    assert [vars(found_scores) for found_scores in one.ensembles] == [
        scores(p, labels) for p in together
    ]
    assert [vars(found_scores) for found_scores in one.averages] == [
        scores(p, labels) for p in averaged
    ]
    pairs = list(zip(together, averaged, strict=True))
    assert list(one.agreements) == [agreement(*pair) for pair in pairs]
    assert list(one.distances) == [distance(*pair) for pair in pairs]
    assert list(one.member_agreements) == [agreement(p, averaged[-1]) for p in single]
    neighbours = list(pairwise(single))
    assert list(one.neighbour_agreements) == [agreement(*pair) for pair in neighbours]
    assert list(one.neighbour_distances) == [distance(*pair) for pair in neighbours]
    parameters = [name for name, _ in Net().named_parameters()]
    middle = {name: torch.stack([s[name].double() for s in states]).mean(0) for name in parameters}
    for member, state in zip(found.members, states, strict=True):
        squares = sum((state[name] - middle[name]).square().sum() for name in parameters)
        assert member.weight_distance == pytest.approx(float(squares) ** 0.5)


def test_some_of_these_models_agree_more_than_others(tmp_path: Path) -> None:
    (one,) = compared(tmp_path).loaders
    assert len({*one.agreements, *one.member_agreements, *one.neighbour_agreements}) > 4
    assert 0 < one.averages[-1].accuracy < 100


def test_the_mean_member_is_the_mean_of_their_scores(tmp_path: Path) -> None:
    (one,) = compared(tmp_path).loaders
    for metric in ("accuracy", "error", "nll", "ece"):
        values = [getattr(scores, metric) for scores in one.members]
        assert getattr(one.mean_member, metric) == pytest.approx(sum(values) / N_MEMBERS)


def test_reliability_tables_hold_every_label_once(tmp_path: Path) -> None:
    paths = save_run(tmp_path)
    (one,) = compared(tmp_path, sources=paths).loaders
    newest = probabilities(load_file(paths[-1]), TEST)
    confidence, guesses = newest.max(1)
    right = (guesses == torch.cat([batch[1] for batch in TEST])).double()
    assert len(one.newest_reliability) == N_BINS
    for bin in one.newest_reliability:
        inside = (confidence > bin.low) & (confidence <= bin.high)
        assert bin.count == inside.sum()
        if bin.count:
            assert bin.confidence == pytest.approx(100 * confidence[inside].mean().item())
            assert bin.accuracy == pytest.approx(100 * right[inside].mean().item())
        else:
            assert bin.confidence is bin.accuracy is None
    for bins, scores in (
        (one.ensemble_reliability, one.ensembles[-1]),
        (one.average_reliability, one.averages[-1]),
    ):
        assert sum(bin.count for bin in bins) == one.n_labels
        rights = sum(bin.count * (bin.accuracy or 0) for bin in bins)
        assert rights / one.n_labels == pytest.approx(scores.accuracy)


def test_the_newest_checkpoint_is_the_same_one_in_either_order(tmp_path: Path) -> None:
    (oldest,) = compared(tmp_path).loaders
    (newest,) = compared(tmp_path, order="newest", overwrite=True).loaders
    assert oldest.newest_reliability == newest.newest_reliability
    assert oldest.members == newest.members[::-1]
    assert oldest.averages[-1] == newest.averages[-1]  # sums of these are exact in float64


@pytest.mark.parametrize("layout", ["safetensors", "torch", "sharded safetensors"])
def test_averages_are_those_of_average_checkpoints_bit_for_bit(tmp_path: Path, layout: str) -> None:
    seen: list[dict[str, Tensor]] = []

    def forward(model: nn.Module, batch: Any) -> Any:
        if not isinstance(batch, Tensor) and len(batch[0]) == 7:  # once a pass, with labels
            seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return model(batch[0] if isinstance(batch, list | tuple) else batch)

    paths = save_run(tmp_path, layout=layout)
    loaders = [Loader(name="test", batches=TEST)]
    evaluation = LabelledEvaluation(loaders=loaders, forward=forward)
    ensemble(
        paths, tmp_path / "out", plot=False,
        evaluation=BnPass(model=Net, batches=TRAIN, evaluate=evaluation, forward=forward),
    )  # fmt: skip
    averages = seen[1::2]
    assert len(averages) == N_MEMBERS
    judged = average_checkpoints(
        paths,
        tmp_path / "averages",
        schemes=[f"uniform:first={n}" for n in range(1, N_MEMBERS + 1)],
        batchnorm=BnPass(model=Net, batches=TRAIN, evaluate=LabelledEvaluation(loaders=loaders)),
    )
    told = json.loads((tmp_path / "out" / "ensemble.json").read_text())
    for at, output in enumerate(judged.outputs):
        expected = load_file(output.path / "model.safetensors")
        assert expected.keys() == averages[at].keys()
        for name, value in expected.items():
            assert torch.equal(averages[at][name], value), name
        assert output.metrics is not None
        assert told["loaders"][0]["averages"][at]["nll"] == output.metrics["test_loss"]


def test_integers_come_from_the_newest_member(tmp_path: Path) -> None:
    for order, expected in (("oldest", [1, 2, 3, 4]), ("newest", [4, 4, 4, 4])):
        seen: list[int] = []

        def forward(model: nn.Module, batch: Any, seen: list[int] = seen) -> Any:
            seen.append(int(model.get_buffer("counter")[0]))
            return model(batch[0])

        loaders = [Loader(name="test", batches=TEST[:1])]
        ensemble(
            save_run(tmp_path, Plain),
            tmp_path / "out",
            evaluation=BnPass(
                model=Plain, evaluate=LabelledEvaluation(loaders=loaders, forward=forward)
            ),
            order=order,  # type: ignore[arg-type]  # one of the two
            plot=False,
            overwrite=True,
        )
        assert seen[1::2] == expected


def test_16_bit_weights_are_rounded_once(tmp_path: Path) -> None:
    class Halved(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.to(torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(torch.bfloat16))

    seen: list[Tensor] = []

    def forward(model: nn.Module, batch: Any) -> Any:
        seen.append(model.get_parameter("head.weight").detach().clone())
        return model(batch[0])

    paths = save_run(tmp_path, Halved)
    evaluation = LabelledEvaluation(loaders=[Loader(name="t", batches=TEST[:1])], forward=forward)
    ensemble(
        paths, tmp_path / "out", evaluation=BnPass(model=Halved, evaluate=evaluation), plot=False
    )
    average_checkpoints(paths, tmp_path / "average")
    expected = load_file(tmp_path / "average" / "model.safetensors")["head.weight"]
    assert expected.dtype == torch.bfloat16
    assert torch.equal(seen[-1], expected)


def test_double_precision_is_kept(tmp_path: Path) -> None:
    def double() -> nn.Module:
        return Plain().double()

    paths = save_run(tmp_path, double)
    evaluation = passes(double, None, test=[(inputs.double(), labels) for inputs, labels in TEST])
    (one,) = compared(tmp_path, evaluation, sources=paths).loaders
    inputs, labels = (torch.cat(parts) for parts in zip(*TEST, strict=True))
    model = double()
    for scores, path in zip(one.members, paths, strict=True):
        model.load_state_dict(load_file(path))
        loss = functional.cross_entropy(model(inputs.double()), labels).item()
        assert scores.nll == pytest.approx(loss, rel=1e-13)


def test_every_loader_is_compared_by_itself(tmp_path: Path) -> None:
    together = compared(tmp_path, passes(test=TEST, validation=VALIDATION)).loaders
    apart = [
        compared(tmp_path, passes(**{name: batches}), overwrite=True).loaders[0]
        for name, batches in (("test", TEST), ("validation", VALIDATION))
    ]
    assert list(together) == apart


def test_how_the_labels_are_batched_changes_nothing(tmp_path: Path) -> None:
    inputs, labels = (torch.cat(parts) for parts in zip(*TEST, strict=True))
    data = TensorDataset(inputs, labels)
    (one,) = compared(tmp_path).loaders
    (other,) = compared(tmp_path, passes(test=DataLoader(data, 5)), overwrite=True).loaders
    assert [vars(found) for found in other.averages] == [
        {name: pytest.approx(value, rel=1e-6) for name, value in vars(found).items()}
        for found in one.averages
    ]
    assert other.agreements == one.agreements


def test_ignored_labels_do_not_count(tmp_path: Path) -> None:
    padded = [
        (torch.cat([inputs, inputs]), torch.cat([labels, torch.full_like(labels, -100)]))
        for inputs, labels in TEST
    ]
    (one,) = compared(tmp_path).loaders
    (other,) = compared(tmp_path, passes(test=padded), overwrite=True).loaders
    assert other.n_labels == one.n_labels
    assert other.agreements == one.agreements


def test_a_selection_takes_some_of_the_checkpoints(tmp_path: Path) -> None:
    paths = save_run(tmp_path)
    found = compared(tmp_path, sources=paths, selection=Selection(last=2))
    assert [member.source for member in found.members] == [str(path) for path in paths[-2:]]


def test_the_model_may_have_no_batchnorm_layers(tmp_path: Path) -> None:
    found = compared(tmp_path, passes(Plain, None), sources=save_run(tmp_path, Plain))
    assert found.bn_statistics is None
    again = compared(tmp_path, passes(Plain), sources=save_run(tmp_path, Plain), overwrite=True)
    assert again.loaders == found.loaders
    assert "the model has no BatchNorm layers: no BN pass was needed" in again.notes


# ---- what stands in the directory ----------------------------------------------------------------


def test_json_and_csv_hold_all_numbers(tmp_path: Path) -> None:
    found = compared(tmp_path, passes(test=TEST, validation=VALIDATION), command="ckptavg e")
    assert found.files == ("ensemble.json", "ensemble.csv")
    assert sorted(tree(tmp_path / "out")) == sorted(found.files)
    told = json.loads((tmp_path / "out" / "ensemble.json").read_text())
    assert (told["kind"], told["format_version"], told["command"]) == ("ensemble", 1, "ckptavg e")
    assert told["summary"] == list(found.summary)
    assert told["bn_statistics"] == "stored"
    assert [one["step"] for one in told["members"]] == [1, 2, 3, 4]
    assert told["loaders"][1]["agreements"] == list(found.loaders[1].agreements)
    rows = list(csv.DictReader((tmp_path / "out" / "ensemble.csv").read_text().splitlines()))
    assert [(row["loader"], row["what"], row["n"]) for row in rows] == [
        (loader, what, str(n))
        for loader in ("test", "validation")
        for what in ("member", "ensemble", "average")
        for n in range(1, N_MEMBERS + 1)
    ]
    by_what = {(row["loader"], row["what"], row["n"]): row for row in rows}
    one = found.loaders[0]
    average, member = by_what["test", "average", "3"], by_what["test", "member", "2"]
    assert float(average["nll_nats"]) == one.averages[2].nll
    assert float(average["agreement_percent"]) == one.agreements[2]
    assert float(average["probability_distance"]) == one.distances[2]
    assert float(member["agreement_percent"]) == one.member_agreements[1]
    assert float(member["probability_distance"]) == one.neighbour_distances[0]
    assert float(member["weight_distance"]) == found.members[1].weight_distance
    assert member["checkpoint"] == found.members[1].source


def test_the_summary_says_what_the_numbers_say(tmp_path: Path) -> None:
    found = compared(tmp_path)
    (one,) = found.loaders
    assert found.summary[0] == (
        f"the average agrees with the ensemble of 4 on {one.agreements[-1]:.1f} % of the 67 labels "
        f"of test; its NLL is {one.averages[-1].nll:.4g} nats, that of the ensemble "
        f"{one.ensembles[-1].nll:.4g}"
    )
    assert f"the average is right for {one.averages[-1].accuracy:.2f} %" in found.summary[1]
    assert "times as far" in found.summary[2]
    assert "better calibrated" in found.summary[3]


def test_pictures_are_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    evaluation = passes(test=TEST, validation=VALIDATION)
    found = compared(tmp_path, evaluation, plot=True)
    assert found.files == ("ensemble.json", "ensemble.csv", "ensemble.png", "ensemble.svg")
    first = tree(tmp_path / "out")
    assert first["ensemble.png"].startswith(b"\x89PNG")
    width, height = (int.from_bytes(first["ensemble.png"][at : at + 4], "big") for at in (16, 20))
    assert width > height > 600
    compared(tmp_path, evaluation, plot=True, overwrite=True)
    assert tree(tmp_path / "out") == first


def test_progress_counts_models_and_checkpoints(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []
    compared(tmp_path, progress=lambda *call: calls.append(call))
    assert calls == 8 * [("ensemble", 1, 8)] + 4 * [("distances", 1, 4)]


# ---- what goes wrong -----------------------------------------------------------------------------


def test_batchnorm_layers_need_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has 1 BatchNorm layers.*batches \(--data\)"):
        compared(tmp_path, passes(batches=None))


def test_recomputed_members_need_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"need training data: batches \(--data\)"):
        compared(tmp_path, passes(Plain, None), members="recomputed")


def one_way(batches: Sequence[Any]) -> Iterator[Any]:
    yield from batches


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (lambda: passes(test=one_way(TEST)), "loader 'test': is a generator"),
        (lambda: passes(batches=one_way(TRAIN)), "the data is a generator"),
        (lambda: BnPass(model=Net, batches=TRAIN, evaluate=lambda m: 1.0), "needs labelled batche"),
        (lambda: BnPass(model=Net, batches=TRAIN), "needs labelled batches"),
        (lambda: with_evaluation(also=lambda model: 1.0), "(--eval) judges one model"),
        (lambda: with_evaluation(weight_decay=0.1), "(--weight-decay) belongs to the loss of one"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_read(
    tmp_path: Path, evaluation: Callable[[], BnPass], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        compared(tmp_path, evaluation())
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def with_evaluation(**options: Any) -> BnPass:
    evaluation = LabelledEvaluation(loaders=[Loader(name="test", batches=TEST)], **options)
    return BnPass(model=Net, batches=TRAIN, evaluate=evaluation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": "own"}, "members is 'own', expected one of stored, recomputed"),
        ({"order": "random"}, "order is 'random', expected one of oldest, newest"),
        ({"memory_budget_bytes": 0}, "memory_budget_bytes is 0, expected at least 1"),
        ({"device": "tpu"}, "device: 'tpu' is not one of"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        compared(tmp_path, **options)
    assert message in str(caught.value)


def test_one_checkpoint_is_no_ensemble(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="at least two checkpoints, and there is one"):
        compared(tmp_path, sources=save_run(tmp_path)[:1])


def test_probabilities_beyond_the_budget_are_refused(tmp_path: Path) -> None:
    # 12 bytes a class, 8 for the label, 4 for each guess of four members and the average
    needed = 67 * (12 * N_CLASSES + 8 + 4 * 5)
    found = compared(tmp_path, memory_budget_bytes=needed)
    assert found.held_nbytes == needed
    with pytest.raises(MemoryBudgetError) as caught:
        compared(tmp_path, memory_budget_bytes=needed - 1, overwrite=True)
    assert str(caught.value) == (
        f"loader 'test': the probabilities of the first 67 labels, 3 classes each, need {needed} "
        f"bytes, more than the memory budget of {needed - 1} bytes; raise the budget (--memory), "
        "or give fewer data (--loader)"
    )


class Other:
    """Gives something else in every pass."""

    def __init__(self, *passes: Sequence[Any]) -> None:
        self._passes = list(passes)

    def __iter__(self) -> Iterator[Any]:
        found = self._passes.pop(0) if len(self._passes) > 1 else self._passes[0]
        return iter(found)


@pytest.mark.parametrize(
    ("second", "where"),
    [
        ([TEST[1], TEST[0], TEST[2]], ""),
        (TEST[:2], "from batch 3 on "),
        ([TEST[0], TEST[2], TEST[1]], "from batch 2 on "),
        ([*TEST, TEST[0]], "from batch 4 on "),
    ],
)
def test_loaders_that_shuffle_are_refused(
    tmp_path: Path, second: Sequence[Any], where: str
) -> None:
    with pytest.raises(ModelError) as caught:
        compared(tmp_path, passes(test=Other(TEST, second)))
    assert str(caught.value) == (
        f"loader 'test': {where}gives other batches than in the pass before; an ensemble needs the "
        "same in the same order: leave shuffling out"
    )


def test_a_loader_that_shuffles_by_torchs_random_numbers_gives_one_order(tmp_path: Path) -> None:
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*TEST, strict=True)))
    (one,) = compared(tmp_path).loaders
    shuffled = passes(test=DataLoader(data, 9, shuffle=True))
    (other,) = compared(tmp_path, shuffled, overwrite=True).loaders
    assert other.agreements == one.agreements


def test_batches_with_other_numbers_of_classes_are_refused(tmp_path: Path) -> None:
    def forward(model: nn.Module, batch: Any) -> Any:
        return model(batch[0])[:, : 2 + len(batch[0]) // 30]

    labels = [(inputs, labels.clamp_max(1)) for inputs, labels in TEST]
    evaluation = LabelledEvaluation(loaders=[Loader(name="t", batches=labels)], forward=forward)
    with pytest.raises(ModelError, match="2 classes for one batch, and 3 for those before"):
        compared(tmp_path, BnPass(model=Net, batches=TRAIN, evaluate=evaluation))


def test_outputs_of_other_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected integer labels and a logit for each class"):
        compared(tmp_path, passes(test=[(TEST[0][0], TEST[0][0])]))


def test_a_model_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"evaluating 'member 1, .*step1.*' failed"):
        compared(tmp_path, passes(test=[(torch.ones(2, 9), torch.tensor([0, 1]))]))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    paths = save_run(tmp_path)
    state = load_file(paths[1])
    state["head.bias"][0] = float("nan")
    save_checkpoint(tmp_path / "step2", state, "safetensors")
    with pytest.raises(IncompatibleCheckpointsError, match=r"step2.*'head.bias' holds infinity"):
        compared(tmp_path, sources=paths)


def test_a_checkpoint_that_does_not_fit_is_refused_before_any_is_run(tmp_path: Path) -> None:
    paths = save_run(tmp_path)
    state = load_file(paths[0])
    del state["head.bias"]
    save_checkpoint(tmp_path / "step1", state, "safetensors")
    with pytest.raises(ModelError, match=r"step1.*does not fit the model"):
        compared(tmp_path, sources=paths)


def test_layers_whose_parts_have_no_mean_are_refused(tmp_path: Path) -> None:
    def normed() -> nn.Module:
        model = Plain()
        nn.utils.parametrizations.weight_norm(model.head)
        return model

    with pytest.raises(IncompatibleCheckpointsError, match=r"is a weight.norm layer"):
        compared(tmp_path, passes(normed, None), sources=save_run(tmp_path, normed))


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    compared(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="already exists; pass --overwrite"):
        compared(tmp_path)
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="also holds 'mine.txt'"):
        compared(tmp_path, overwrite=True)
    (tmp_path / "out" / "mine.txt").unlink()
    assert tree(tmp_path) == before


def test_a_plot_without_matplotlib_is_refused_before_anything_is_read(
    tmp_path: Path, without_matplotlib: None
) -> None:
    with pytest.raises(UsageError, match=r"pip install 'ckptavg\[plots\]' \(or --no-plot\)"):
        compared(tmp_path, plot=True)
    compared(tmp_path, plot=False)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="an ensemble is made by one process"):
        compared(tmp_path)


def test_the_users_model_is_left_in_the_mode_it_was_in(tmp_path: Path) -> None:
    model = Net()
    model.bn.eval()
    compared(tmp_path, passes(model))
    assert (model.training, model.bn.training, model.head.training) == (True, False, True)


# ---- the command line ----------------------------------------------------------------------------

MODULE = """
from test_ensemble import Net, TEST, TRAIN, VALIDATION
import torch

def build():
    print("building")
    return Net()

def train():
    return TRAIN

def test():
    return TEST

validation = VALIDATION

def accuracy(model):
    return 1.0

def forward(model, batch):
    return model(batch if torch.is_tensor(batch) else batch[0])
"""
ARGUMENTS = [
    "ensemble", "step*.safetensors", "-o", "out", "--model", "classes:build", "--data",
    "classes:train", "--loader", "test=classes:test",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    monkeypatch.delitem(sys.modules, "classes", raising=False)
    (tmp_path / "classes.py").write_text(MODULE)
    save_run(tmp_path)
    return tmp_path


def test_the_command_line_shows_a_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGUMENTS, "--no-plot"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("out: 4 checkpoints as an ensemble and as an average, ")
    assert [re.split(r" {2,}", line.strip())[0] for line in lines[1:6]] == [
        "test", "last checkpoint", "a checkpoint, mean of 4", "ensemble of 4",
        "average of 4 + BN pass",
    ]  # fmt: skip
    assert len({len(line) for line in lines[1:6]}) == 1  # aligned
    told = json.loads((here / "out" / "ensemble.json").read_text())
    average = told["loaders"][0]["averages"][-1]
    assert f"{average['accuracy']:.2f} %" in lines[5]
    assert f"{average['nll']:.4f} nats" in lines[5]
    assert lines[6].strip() == told["summary"][0]
    assert lines[-1] == "  files: ensemble.json, ensemble.csv"
    assert "building" in err
    assert told["command"].startswith("ckptavg")


def test_json_holds_the_whole_result(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([
        *ARGUMENTS, "--json", "--last", "3", "--loader", "val=classes:validation", "--members",
        "recomputed", "--order", "newest", "--forward", "classes:forward",
    ]) == 0  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == ["ensemble.json", "ensemble.csv", "ensemble.png", "ensemble.svg"]
    assert [one["step"] for one in told["members"]] == [4, 3, 2]
    assert [one["name"] for one in told["loaders"]] == ["test", "val"]
    assert (told["output"], told["bn_statistics"]) == ("out", "recomputed")


def test_loaders_may_come_without_data_where_no_layer_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    save_run(tmp_path, Plain)
    assert run([
        "ensemble", "step*.safetensors", "-o", "out", "--model", "test_ensemble:Plain",
        "--loader", "test=test_ensemble:TEST", "--amp", "bfloat16", "--channels-last",
        "--no-plot", "--quiet",
    ]) == 0  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ARGUMENTS[:4], *ARGUMENTS[6:]], "--model is missing"),
        (ARGUMENTS[:8], "--loader is missing"),
        ([*ARGUMENTS[:6], *ARGUMENTS[8:]], "has 1 BatchNorm layers"),
        ([*ARGUMENTS, "--eval", "classes:accuracy"], "(--eval) judges one model"),
        ([*ARGUMENTS, "--eval-command", "ev {model}"], "--eval-command judges model directories"),
        ([*ARGUMENTS, "--weight-decay", "1"], "(--weight-decay) belongs to the loss of one model"),
        ([*ARGUMENTS, "--loader", "classes:test"], "is not of the form NAME=PKG.MOD:THING"),
        ([*ARGUMENTS, "--loader", "t=classes"], "--loader t: 'classes' is not of the form"),
        ([*ARGUMENTS, "--loader", "test=classes:validation"], "2 loaders are called 'test'"),
        ([*ARGUMENTS[:6], *ARGUMENTS[8:], "--batches", "3"], "--batches needs --data"),
    ],
)
def test_wrong_usage_exits_with_2(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ARGUMENTS, "--memory", "100"], "more than the memory budget of 100 bytes"),
        ([*ARGUMENTS, "--loader", "t=classes:nothing"], "--loader t classes:nothing: cannot be"),
        ([*ARGUMENTS, "--loader", "t=sys:maxsize"], "--loader t sys:maxsize: is a int, expected"),
    ],
)
def test_failures_exit_with_1(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run([*arguments, "--no-plot"]) == 1
    assert message in capsys.readouterr().err
    assert not (here / "out").exists()


def test_the_command_makes_its_evaluation_known_by_name(here: Path) -> None:
    from ckptavg.cli.landscapes import landscape_arguments
    from ckptavg.evaluation_log import judge_text

    def arguments(**changed: Any) -> dict[str, Any]:
        context = landscape_context(["--loader", "test=classes:test", *changed.pop("more", ())])
        return landscape_arguments({**context, **changed})

    first = arguments()
    assert set(first) == {
        "evaluation", "selection", "state_key", "strip_prefixes", "keep_prefix", "cache", "device",
        "memory_budget_bytes", "n_threads", "overwrite", "plot",
    }  # fmt: skip
    told = judge_text(first["evaluation"])
    assert told is not None
    assert judge_text(arguments()["evaluation"]) == told
    for more in (
        ["--weight-decay", "0.1"],
        ["--loader", "val=classes:validation"],
        ["--eval", "classes:accuracy"],
        ["--forward", "classes:forward"],
    ):
        assert judge_text(arguments(more=more)["evaluation"]) != told
    found = evaluated(Net(), arguments(more=["--eval", "classes:accuracy"])["evaluation"].evaluate)
    assert list(found) == ["test_loss", "test_error", "metric"]


def landscape_context(more: Sequence[str]) -> dict[str, Any]:
    """Return what click makes of the options of a command."""
    import click

    from ckptavg.cli.landscapes import landscape_options

    @click.command("plane")
    @landscape_options()
    def command(**options: Any) -> None:
        pass

    arguments = ["-o", "out", "--model", "classes:build", *more]
    return dict(command.make_context("plane", arguments).params)


def test_an_evaluation_by_function_alone_will_do_where_no_labels_are_needed(here: Path) -> None:
    from ckptavg.cli.landscapes import landscape_arguments

    found = landscape_arguments(landscape_context(["--eval", "classes:accuracy"]))
    assert evaluated(Net(), found["evaluation"].evaluate) == {"metric": 1.0}
