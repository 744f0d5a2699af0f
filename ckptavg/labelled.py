"""What classifiers lose and get wrong on labelled batches: loss and error by loader."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ckptavg.batchnorm.batches import Batch, Feed, refuse_used_up
from ckptavg.batchnorm.kept import convolutions_channels_last, random_state_kept
from ckptavg.batchnorm.observer import default_forward
from ckptavg.bn_options import Amp, BnOptions, Forward
from ckptavg.errors import ModelError, UsageError
from ckptavg.evaluate import Evaluate

IGNORED_LABEL = -100  # as in torch's cross_entropy: no loss, no error, not counted

_LABEL_KEYS = ("labels", "label", "targets")
_NAME = re.compile(r"\w[\w.+-]*")
_FORMS = (
    "expected integer labels and a logit for each class: (N, classes) with (N), (N, L, classes) "
    "with (N, L), or (N, classes, ...) with (N, ...); other metrics are for evaluate (--eval)"
)


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Labelled batches under a name; going through it goes through the batches.

    Attributes:
        name: What metrics and pictures call it, such as ``test``.
        batches: An iterable of batches, or a function without arguments that returns one. A batch
            is a tuple or list (inputs, labels, ...), or a mapping with ``labels`` (or ``label``,
            ``targets``).

    Raises:
        UsageError: If the name is none that metrics can have.
    """

    name: str
    batches: Iterable[Any] | Callable[[], Iterable[Any]]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(f"loader '{self.name}': expected a name such as test")

    def __iter__(self) -> Iterator[Any]:
        """Go through the batches.

        Raises:
            ModelError: If there is nothing to go through.
        """
        found = self.batches
        if callable(found) and not isinstance(found, Iterable):
            found = found()
        if not isinstance(found, Iterable):
            raise ModelError(
                f"loader '{self.name}': is a {type(found).__name__}, expected an iterable of "
                "batches"
            )
        return iter(found)

    def check_repeatable(self, n_passes: int) -> None:
        """Refuse batches that can be gone through only once, where several passes need them.

        Raises:
            UsageError: If so.
        """
        refuse_used_up(f"loader '{self.name}':", self.batches, n_passes)


@dataclass(frozen=True, kw_only=True)
class LabelledEvaluation:
    """Loss and error of a classifier on each loader; calling it with a model returns them.

    It is made to be ``BnPass.evaluate``: what calls it puts the model into evaluation mode.

    Attributes:
        loaders: What the model is tried on.
        forward: ``forward(model, batch)`` returns the model's output for a batch; None passes
            tensors and first items of tuples as they are, and mappings as keyword arguments.
        amp: Run the model under autocast to this dtype; losses are computed in float32 at least.
        channels_last: Run convolutions with channels last in memory, which GPUs prefer.
        weight_decay: Half of it times the squared norm of all parameters is added to every loss:
            the L2-regularised loss that training minimised (Izmailov et al. 2018, Figures 3-5).
        also: A further evaluation, whose metrics are told beside.

    Raises:
        UsageError: If a value makes no sense.
    """

    loaders: Sequence[Loader]
    forward: Forward | None = None
    amp: Amp | None = None
    channels_last: bool = False
    weight_decay: float = 0.0
    also: Evaluate | None = None

    def __post_init__(self) -> None:
        BnOptions(amp=self.amp)  # refuses other dtypes
        if not self.loaders:
            raise UsageError("an evaluation on labelled batches needs a loader (--loader)")
        name, count = Counter(loader.name for loader in self.loaders).most_common(1)[0]
        if count > 1:
            raise UsageError(f"{count} loaders are called '{name}': give each a name of its own")
        if not 0 <= self.weight_decay < float("inf"):
            raise UsageError(
                f"weight_decay is {self.weight_decay}, expected a number such as 0.0005"
            )

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return ``<loader>_loss`` and ``<loader>_error`` for every loader.

        The loss is the mean negative log-likelihood in nats per label, the error the percentage of
        labels that are not the class with the largest logit.

        Raises:
            ModelError: If a batch or an output is not that of a classifier, or a loader is empty.
            Exception: Whatever the model and the loaders raise.
        """
        return self.of_models([model])[0]

    def of_models(self, models: Sequence[nn.Module]) -> list[dict[str, float]]:
        """Return the metrics of several models on one device, each batch loaded once for all.

        Raises:
            ModelError: As for one model.
            Exception: Likewise.
        """
        all_metrics: list[dict[str, Any]] = [{} for _ in models]
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(self.ready(model))
            penalties = [l2_penalty(model, self.weight_decay) for model in models]
            for loader in self.loaders:
                tallies = [Tally() for _ in models]
                for batch in self.batches(loader, models[0]):
                    for model, tally in zip(models, tallies, strict=True):
                        tally.add(self.output(model, batch), batch.value)
                if not tallies[0].n_labels:
                    raise ModelError(f"loader '{loader.name}': gave no labels{once_only(loader)}")
                for metrics, tally, penalty in zip(all_metrics, tallies, penalties, strict=True):
                    metrics[f"{loader.name}_loss"] = tally.loss + penalty
                    metrics[f"{loader.name}_error"] = tally.error
        return [
            self._with_others(model, metrics)
            for model, metrics in zip(models, all_metrics, strict=True)
        ]

    def _with_others(self, model: nn.Module, metrics: dict[str, Any]) -> dict[str, Any]:
        """Return metrics with those of the further evaluation, if there is one."""
        if self.also is None:
            return metrics
        with random_state_kept(None):  # the next model finds the same
            value = self.also(model)
        others: Mapping[str, Any] = value if isinstance(value, Mapping) else {"metric": value}
        for name in others:
            if name in metrics:
                raise ModelError(
                    f"the evaluation returned '{name}', which is what a loader's metric is called: "
                    "rename one of them"
                )
        return metrics | dict(others)

    def check_repeatable(self, n_passes: int) -> None:
        """Refuse loaders that can be gone through only once, where several passes need them.

        Raises:
            UsageError: If so.
        """
        for loader in self.loaders:
            loader.check_repeatable(n_passes)

    @contextmanager
    def ready(self, model: nn.Module) -> Iterator[None]:
        """Let a model run without gradients, and laid out as was asked for."""
        with torch.no_grad(), convolutions_channels_last(model, wanted=self.channels_last):
            yield

    def batches(self, loader: Loader, model: nn.Module) -> Iterator[Batch]:
        """Yield a loader's batches, as they came and where the model is."""
        yield from Feed(loader, device_of(model), BnOptions(channels_last=self.channels_last))

    def output(self, model: nn.Module, batch: Batch) -> object:
        """Return what the model makes of a batch."""
        return run_model(model, batch.on_device, self.forward, amp=self.amp)


class Tally:
    """Loss and error of one model on one loader, summed batch by batch.

    Sums are float64 and stay on the device: nothing waits for a GPU before they are asked for.

    Attributes:
        n_labels: How many labels were counted.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self.n_labels = 0
        self._loss: Tensor | None = None
        self._wrong: Tensor | None = None

    def add(self, output: object, batch: Any) -> None:
        """Count a batch.

        Args:
            output: What the model made of it.
            batch: As the loader gave it: labels in host memory spare a GPU a wait.

        Raises:
            ModelError: If they are not those of a classifier.
        """
        logs, labels = log_probabilities(output, labels_of(batch))
        loss = negative_log_likelihood(logs, labels).sum()
        wrong = (logs.argmax(dim=1) != labels).sum()
        self.n_labels += len(labels)
        self._loss = loss if self._loss is None else self._loss + loss
        self._wrong = wrong if self._wrong is None else self._wrong + wrong

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats per label; NaN without labels."""
        return self._mean(self._loss)

    @property
    def error(self) -> float:
        """Percentage of labels that the model gets wrong; NaN without labels."""
        return 100 * self._mean(self._wrong)

    def _mean(self, total: Tensor | None) -> float:
        return float("nan") if total is None or not self.n_labels else float(total) / self.n_labels


def run_model(
    model: nn.Module, batch: Any, forward: Forward | None = None, *, amp: Amp | None = None
) -> object:
    """Return what a model makes of a batch that is where the model is.

    Args:
        model: In the mode in which it is to run.
        batch: Its tensors on the model's device.
        forward: As in ``LabelledEvaluation``.
        amp: Likewise.
    """
    autocast: AbstractContextManager[object] = nullcontext()
    if amp is not None:
        autocast = torch.autocast(device_of(model).type, dtype=getattr(torch, amp))
    with autocast:
        return (forward or default_forward)(model, batch)


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's first parameter is; the CPU without parameters."""
    return next((one.device for one in model.parameters()), torch.device("cpu"))


def l2_penalty(model: nn.Module, weight_decay: float) -> float:
    """Return half the weight decay times the squared norm of all parameters, summed in float64."""
    if not weight_decay:
        return 0.0
    squares = [one.detach().to(torch.float64).square().sum() for one in model.parameters()]
    return 0.5 * weight_decay * float(sum(squares))


def labels_of(batch: Any) -> Tensor:
    """Return a batch's labels, where they are.

    Raises:
        ModelError: If it has none.
    """
    labels: Any = None
    if isinstance(batch, Mapping):
        key = next((key for key in _LABEL_KEYS if key in batch), None)
        labels = None if key is None else batch[key]
        found = f"a mapping with {', '.join(map(str, batch)) or 'nothing'}"
    elif isinstance(batch, (tuple, list)):
        labels = batch[1] if len(batch) > 1 else None
        found = f"a {type(batch).__name__} of {len(batch)}"
    else:
        found = f"a {type(batch).__name__}"
    if isinstance(labels, Tensor):
        return labels
    if labels is not None:
        found += f" whose labels are a {type(labels).__name__}, not a tensor"
    raise ModelError(
        f"a labelled batch is {found}; expected (inputs, labels, ...) or a mapping with labels"
    )


def log_probabilities(output: object, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithms of the probabilities of all classes, and the labels, one row a label.

    Labels of -100 are dropped, as torch's cross_entropy does. Labels stand where their logits do:
    for a language model the loader shifts them.

    Args:
        output: The model's: logits, an object or a mapping with ``logits``, or a tuple that begins
            with them; of shape (N, C), (N, L, C) or (N, C, ...).
        labels: Integers of shape (N), (N, L) or (N, ...), on any device; 0 to C - 1, or -100.

    Returns:
        The log-softmax of the logits, (n, C), float64 where they are, else float32, and the
        labels, (n), int64; both on the device of the logits.

    Raises:
        ModelError: If the output is of another form, or a label of no class.
    """
    rows = _rows(_logits(output), labels)
    n_classes, flat = rows.shape[1], labels.reshape(-1)
    kept = flat != IGNORED_LABEL
    is_class = (flat >= 0) & (flat < n_classes)
    all_kept, all_fit = torch.stack([kept.all(), (is_class | ~kept).all()]).tolist()
    if not all_fit:
        label = int(flat[kept & ~is_class][0])
        raise ModelError(
            f"there is a label {label}, but the model has {n_classes} classes: expected 0 to "
            f"{n_classes - 1}, or {IGNORED_LABEL} for what does not count"
        )
    if not all_kept:
        places = kept.nonzero().squeeze(1)
        flat = flat[places]
        rows = rows[places.to(rows.device, non_blocking=True)]
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    logs = functional.log_softmax(rows, dim=1, dtype=dtype)
    return logs, flat.to(rows.device, torch.int64, non_blocking=True)


def negative_log_likelihood(logs: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each label in nats, (n), float64.

    Args:
        logs: Logarithms of probabilities, (n, C).
        labels: (n), int64.
    """
    return -logs.gather(1, labels[:, None]).squeeze(1).to(torch.float64)


def once_only(loader: Loader) -> str:
    """Say why a loader may have had nothing to give, where that is known."""
    if isinstance(loader.batches, Iterator):
        return (
            f": a {type(loader.batches).__name__} can be gone through only once; give a function "
            "that returns it"
        )
    return ""


def _logits(output: object) -> Tensor:
    found: object = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, (tuple, list)):
        found = output[0] if output else None
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ModelError(
            f"the model's output is a {type(output).__name__} without logits: expected a tensor, "
            "an object or mapping with logits, or a tuple that begins with them; forward "
            "(--forward) may return them"
        )
    return found


def _rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits with one row a label.

    Raises:
        ModelError: If their shape does not fit that of the labels.
    """
    is_integer = not labels.is_floating_point() and labels.dtype != torch.bool and labels.dim() > 0
    fits_last = logits.shape[:-1] == labels.shape
    fits_first = logits.dim() > 2 and logits.shape[:1] + logits.shape[2:] == labels.shape
    shapes = (
        f"the model's output has shape {list(logits.shape)}, and the labels have shape "
        f"{list(labels.shape)} and dtype {str(labels.dtype).removeprefix('torch.')}"
    )
    if is_integer and fits_last and fits_first:
        raise ModelError(
            f"{shapes}: which dimension holds the classes, their sizes do not tell; use batches of "
            "another length"
        )
    rows = logits.movedim(1, -1) if fits_first else logits
    has_classes = logits.is_floating_point() and rows.dim() > 1 and rows.shape[-1] > 1
    if not (is_integer and has_classes and (fits_first or fits_last)):
        raise ModelError(f"{shapes}: {_FORMS}")
    return rows.reshape(-1, rows.shape[-1])
