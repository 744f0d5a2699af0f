"""Loss and error on labelled batches: what is counted, which forms are known, what is refused."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ckptavg import BnPass, LabelledEvaluation, Loader, ModelError, UsageError
from ckptavg.evaluate import evaluated
from ckptavg.labelled import Tally, labels_of, log_probabilities, run_model

N_CLASSES = 5


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, N_CLASSES))


def labelled_batches(sizes: tuple[int, ...] = (7, 4, 1)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, generator=generator),
            torch.randint(N_CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


BATCHES = labelled_batches()


def loader(batches: Any = BATCHES, name: str = "test") -> Loader:
    return Loader(name=name, batches=batches)


def expected(model: nn.Module, batches: list[tuple[Tensor, Tensor]] = BATCHES) -> dict[str, Any]:
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = model.eval()(inputs).double()
    return {
        "test_loss": pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-6),
        "test_error": pytest.approx(100 * (logits.argmax(1) != labels).double().mean().item()),
    }


# ---- what is counted -----------------------------------------------------------------------------


def test_loss_and_error_are_those_of_all_labels_together(device: str) -> None:
    evaluation = LabelledEvaluation(loaders=[loader()])
    assert evaluated(net().to(device), evaluation) == expected(net())


def test_every_loader_has_metrics_of_its_own() -> None:
    other = labelled_batches((9,))
    evaluation = LabelledEvaluation(loaders=[loader(), loader(other, "val.2")])
    found = evaluated(net(), evaluation)
    assert list(found) == ["test_loss", "test_error", "val.2_loss", "val.2_error"]
    assert found["val.2_loss"] == expected(net(), other)["test_loss"]


def test_it_can_be_the_evaluation_of_a_pass() -> None:
    evaluation = LabelledEvaluation(loaders=[loader()])
    assert BnPass(model=net, evaluate=evaluation).evaluate is evaluation


def test_weight_decay_adds_half_of_it_times_the_squared_norm_of_all_parameters() -> None:
    model = net()
    squares = sum(one.double().square().sum().item() for one in model.parameters())
    plain = evaluated(model, LabelledEvaluation(loaders=[loader()]))
    found = evaluated(model, LabelledEvaluation(loaders=[loader()], weight_decay=0.3))
    assert found["test_loss"] - plain["test_loss"] == pytest.approx(0.15 * squares)
    assert found["test_error"] == plain["test_error"]


def test_tied_parameters_are_decayed_once() -> None:
    model = net()
    tied = nn.ModuleDict({"one": model, "same": model})
    evaluation = LabelledEvaluation(
        loaders=[loader()],
        weight_decay=0.3,
        forward=lambda module, batch: module.get_submodule("one")(batch[0]),
    )
    plain = LabelledEvaluation(loaders=[loader()], weight_decay=0.3)
    assert evaluated(tied, evaluation) == evaluated(model, plain)


def test_several_models_may_share_one_pass_through_a_loader() -> None:
    first, second = net(), net()
    last = second[3]
    assert isinstance(last, nn.Linear)
    nn.init.constant_(last.bias[2:], 1.5)
    tallies = [Tally(), Tally()]
    for model in (first, second):
        model.eval()
    with torch.no_grad():
        for batch in loader():
            for model, tally in zip((first, second), tallies, strict=True):
                tally.add(run_model(model, batch), batch)
    for model, tally in zip((first, second), tallies, strict=True):
        assert {"test_loss": tally.loss, "test_error": tally.error} == expected(model)
        assert tally.n_labels == 12


def test_a_tally_of_nothing_has_no_mean() -> None:
    assert Tally().loss != Tally().loss
    assert Tally().error != Tally().error


def test_the_users_own_metrics_are_told_beside() -> None:
    evaluation = LabelledEvaluation(loaders=[loader()], also=lambda model: {"f1": 0.5})
    assert evaluated(net(), evaluation) == {**expected(net()), "f1": 0.5}
    evaluation = LabelledEvaluation(loaders=[loader()], also=lambda model: 2)
    assert evaluated(net(), evaluation)["metric"] == 2


def test_two_metrics_of_one_name_are_refused() -> None:
    evaluation = LabelledEvaluation(loaders=[loader()], also=lambda model: {"test_loss": 1.0})
    with pytest.raises(ModelError, match="returned 'test_loss', which is what a loader's metric"):
        evaluated(net(), evaluation)


def test_the_model_runs_as_it_is_told_to() -> None:
    evaluation = LabelledEvaluation(
        loaders=[loader()], forward=lambda model, batch: {"logits": model(-batch[0])}
    )
    turned = [(-inputs, labels) for inputs, labels in BATCHES]
    assert evaluated(net(), evaluation) == expected(net(), turned)


def test_autocast_changes_what_the_model_does_and_not_how_it_is_summed() -> None:
    dtypes = []

    def forward(model: nn.Module, batch: Any) -> Any:
        output = model(batch[0])
        dtypes.append(output.dtype)
        return output

    evaluation = LabelledEvaluation(loaders=[loader()], amp="bfloat16", forward=forward)
    found = evaluated(net(), evaluation)
    assert set(dtypes) == {torch.bfloat16}
    exact = evaluated(net(), LabelledEvaluation(loaders=[loader()]))
    assert found["test_loss"] != exact["test_loss"]
    assert found["test_loss"] == pytest.approx(exact["test_loss"], rel=0.05)


def test_channels_last_lays_images_and_convolutions_out_and_leaves_the_weights_as_they_were() -> (
    None
):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    weight = next(model.parameters())
    data = weight.data_ptr()
    layouts = []

    def forward(module: nn.Module, batch: Any) -> Any:
        layouts.append(batch[0].is_contiguous(memory_format=torch.channels_last))
        return module(batch[0])

    images = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))]
    plain = evaluated(model, LabelledEvaluation(loaders=[loader(images)]))
    evaluation = LabelledEvaluation(loaders=[loader(images)], channels_last=True, forward=forward)
    assert evaluated(model, evaluation) == pytest.approx(plain, rel=1e-5)
    assert layouts == [True]
    assert weight.data_ptr() == data


def test_no_gradients_are_kept() -> None:
    outputs = []

    def forward(model: nn.Module, batch: Any) -> Any:
        outputs.append(model(batch[0]))
        return outputs[-1]

    LabelledEvaluation(loaders=[loader()], forward=forward)(net())
    assert not any(one.requires_grad for one in outputs)


# ---- forms of outputs and labels -----------------------------------------------------------------


class Logits(NamedTuple):
    logits: Tensor
    hidden: int


class ImageBatch(NamedTuple):
    image: str
    label: Tensor


@pytest.mark.parametrize(
    "form",
    [
        lambda logits: logits,
        lambda logits: (logits, None),
        lambda logits: [logits],
        lambda logits: {"loss": 0, "logits": logits},
        lambda logits: SimpleNamespace(logits=logits),
        lambda logits: Logits(logits, 3),
    ],
)
def test_logits_are_found_in_outputs_of_many_forms(form: Callable[[Tensor], object]) -> None:
    logits, labels = torch.randn(6, 4), torch.arange(6) % 4
    logs, found = log_probabilities(form(logits), labels)
    assert torch.equal(logs, logits.log_softmax(1))
    assert torch.equal(found, labels)


@pytest.mark.parametrize(
    ("shape", "labels_shape", "classes"),
    [
        ((6, 4), (6,), 1),
        ((6, 3, 4), (6, 3), 2),
        ((6, 4, 3), (6, 3), 1),
        ((2, 4, 3, 5), (2, 3, 5), 1),
        ((2, 3, 5, 4), (2, 3, 5), 3),
        ((1, 4, 1), (1, 1), 1),
    ],
)
def test_classes_may_be_the_last_dimension_or_the_second(
    shape: tuple[int, ...], labels_shape: tuple[int, ...], classes: int
) -> None:
    logits, labels = torch.randn(shape), torch.randint(4, labels_shape)
    tally = Tally()
    tally.add(logits, (None, labels))
    first = logits.movedim(classes, 1)
    assert tally.n_labels == labels.numel()
    assert tally.loss == pytest.approx(functional.cross_entropy(first, labels).item(), rel=1e-5)
    wrong = (first.argmax(1) != labels).double().mean().item()
    assert tally.error == pytest.approx(100 * wrong)


def test_ignored_labels_do_not_count(device: str) -> None:
    logits, labels = torch.randn(4, 6, 3), torch.randint(3, (4, 6))
    labels[:, ::2] = -100
    for where in ("cpu", device):
        tally = Tally()
        tally.add(logits.to(device), {"labels": labels.to(where)})
        loss = functional.cross_entropy(logits.movedim(2, 1), labels)
        assert tally.loss == pytest.approx(loss.item(), rel=1e-5)
        assert tally.n_labels == 12
    logs, found = log_probabilities(logits, labels)
    assert (logs.shape, found.shape) == ((12, 3), (12,))


@pytest.mark.parametrize(
    ("stored", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_probabilities_are_computed_in_float32_at_least(
    stored: torch.dtype, computed: torch.dtype
) -> None:
    logits = torch.randn(6, 4).to(stored)
    logs, _ = log_probabilities(logits, torch.zeros(6, dtype=torch.uint8))
    assert torch.equal(logs, logits.to(computed).log_softmax(1))


@pytest.mark.parametrize(
    "batch",
    [
        ("inputs", torch.tensor([1])),
        ["inputs", torch.tensor([1]), "weights"],
        {"labels": torch.tensor([1]), "label": torch.tensor([2])},
        {"label": torch.tensor([1]), "targets": torch.tensor([2])},
        {"targets": torch.tensor([1])},
        ImageBatch("inputs", torch.tensor([1])),
    ],
)
def test_labels_are_found_in_batches_of_many_forms(batch: Any) -> None:
    assert labels_of(batch).tolist() == [1]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(2), "a labelled batch is a Tensor; expected (inputs, labels, ...)"),
        ((torch.ones(2),), "is a tuple of 1"),
        ({"x": 1, "y": 2}, "is a mapping with x, y"),
        ({}, "is a mapping with nothing"),
        ((1, [1, 2]), "is a tuple of 2 whose labels are a list, not a tensor"),
    ],
)
def test_batches_without_labels_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        labels_of(batch)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("output", "labels", "message"),
    [
        (torch.ones(6, 4), torch.ones(5), "shape [6, 4], and the labels have shape [5] and dtype"),
        (torch.ones(6, 4), torch.ones(5).long(), "a logit for each class"),
        (torch.ones(6, 4), torch.ones(6), "dtype float32: expected integer labels"),
        (torch.ones(6, 4), torch.ones(6, 4).long(), "expected integer labels and a logit"),
        (torch.ones(6, 1), torch.ones(6).long(), "a logit for each class"),
        (torch.ones(6), torch.ones(6).long(), "other metrics are for evaluate (--eval)"),
        (torch.ones(6, 4), torch.ones(6).bool(), "dtype bool"),
        (torch.ones(4), torch.tensor(3), "labels have shape []"),
        (torch.ones(6, 4).long(), torch.ones(6).long(), "a logit for each class"),
        (torch.ones(6, 3, 3), torch.ones(6, 3).long(), "which dimension holds the classes"),
        (torch.ones(2, 4), torch.tensor([0, 4]), "a label 4, but the model has 4 classes"),
        (torch.ones(2, 4), torch.tensor([-1, 0]), "a label -1, but the model has 4 classes"),
        ({"loss": torch.ones(())}, torch.ones(6).long(), "is a dict without logits"),
        ((), torch.ones(6).long(), "is a tuple without logits"),
        (3, torch.ones(6).long(), "is a int without logits"),
    ],
)
def test_what_is_no_classification_is_refused(output: Any, labels: Tensor, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        Tally().add(output, (None, labels))
    assert message in str(caught.value)


# ---- loaders -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batches", [BATCHES, tuple(BATCHES), lambda: BATCHES, lambda: iter(BATCHES)]
)
def test_batches_may_be_an_iterable_or_made_by_a_function(batches: Any) -> None:
    evaluation = LabelledEvaluation(loaders=[loader(batches)])
    evaluation.check_repeatable(2)
    assert evaluated(net(), evaluation) == evaluated(net(), evaluation) == expected(net())


def generated() -> Iterator[tuple[Tensor, Tensor]]:
    yield from BATCHES


def test_a_generator_is_refused_where_several_passes_need_it() -> None:
    evaluation = LabelledEvaluation(loaders=[loader(generated())])
    evaluation.check_repeatable(1)
    with pytest.raises(UsageError, match="'test': is a generator, which can be gone through only"):
        evaluation.check_repeatable(2)


def test_a_generator_used_twice_says_what_is_wrong_with_it() -> None:
    evaluation = LabelledEvaluation(loaders=[loader(generated())])
    evaluated(net(), evaluation)
    with pytest.raises(ModelError, match="gave no labels: a generator can be gone through only"):
        evaluated(net(), evaluation)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (lambda: 3, "loader 'test': is a int, expected an iterable of batches"),
        (3, "loader 'test': is a int, expected an iterable of batches"),
        ([], "loader 'test': gave no labels"),
        ([(torch.ones(1, 3), torch.tensor([-100]))], "loader 'test': gave no labels"),
    ],
)
def test_loaders_that_give_nothing_are_refused(batches: Any, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        evaluated(net(), LabelledEvaluation(loaders=[loader(batches)]))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loaders": []}, "needs a loader"),
        ({"loaders": [loader(), loader()]}, "2 loaders are called 'test'"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"amp": "float8"}, "amp: 'float8' is not one of bfloat16, float16"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        LabelledEvaluation(**{"loaders": [loader()], **options})
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "-x"])
def test_names_that_no_metric_can_have_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="expected a name such as test"):
        loader(name=name)
