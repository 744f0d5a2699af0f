"""What the members of an ensemble predict, added up batch by batch, and what averages predict.

For every label two rows of probabilities are held, however many members there are: the sum over
the members so far, and those of the member before, to tell how far the next one is from it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ckptavg.ensemble_results import LoaderComparison, ReliabilityBin, Scores
from ckptavg.errors import MemoryBudgetError, ModelError
from ckptavg.labelled import (
    LabelledEvaluation,
    Loader,
    device_of,
    labels_of,
    log_probabilities,
    negative_log_likelihood,
    once_only,
)
from ckptavg.landscape.calibration import ProbabilityScores

_SUM_ITEMSIZE, _PROBABILITY_ITEMSIZE = 8, 4
_LABEL_ITEMSIZE, _GUESS_ITEMSIZE = 8, 4
_SHARE_OF_DEVICE = 0.8  # of its free memory; the rest is for the model at work


class Room:
    """How much may be held of all loaders together, where the model runs.

    Attributes:
        held_nbytes: How much is.
    """

    def __init__(self, device: torch.device, memory_budget_bytes: int) -> None:
        """See how much there is: the budget in host memory, or what a GPU has left."""
        self.held_nbytes = 0
        self._limit = memory_budget_bytes
        self._remedy = "raise the budget (--memory), or give fewer data (--loader)"
        self._what = f"the memory budget of {memory_budget_bytes} bytes"
        if device.type == "cuda":  # pragma: no cover - needs a GPU
            free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
            self._limit = int(_SHARE_OF_DEVICE * (free - torch.cuda.memory_allocated(device)))
            self._what = f"the {self._limit} bytes that may be held on {device}"
            self._remedy = (
                "give fewer data (--loader), or use the CPU (--device cpu) with a budget that is "
                "large enough (--memory)"
            )

    def take(self, name: str, nbytes: int, n_labels: int, n_classes: int) -> None:
        """Count what will be held of one more batch.

        Raises:
            MemoryBudgetError: If it is too much.
        """
        self.held_nbytes += nbytes
        if self.held_nbytes > self._limit:
            raise MemoryBudgetError(
                f"loader '{name}': the probabilities of the first {n_labels} labels, {n_classes} "
                f"classes each, need {self.held_nbytes} bytes, more than {self._what}; "
                f"{self._remedy}"
            )


@dataclass
class _Part:
    """What is held of one batch: (n, C) sums and probabilities, (n) labels and guesses."""

    labels: Tensor
    total: Tensor
    before: Tensor
    guesses_of_average: Tensor
    guesses: list[Tensor] = field(default_factory=list)  # of each member


class _Comparing:
    """Sums of what two predictions of the same labels have in common."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._n_labels = 0

    def add(self, difference: Tensor, equal: Tensor) -> None:
        """Count a batch: differences of probabilities, (n, C), and whether guesses are equal."""
        self._sums += torch.stack([difference.norm(dim=1).sum(), equal.sum()])
        self._n_labels += len(equal)

    def found(self) -> tuple[float, float]:
        """Return the mean distance, and the percentage of equal guesses."""
        distance, equal = self._sums.tolist()
        return distance / self._n_labels, 100 * equal / self._n_labels


class Predictions:
    """Predictions on one loader: of members, one after the other, and of averages of them.

    Attributes:
        loader: The loader.
    """

    def __init__(
        self, loader: Loader, evaluation: LabelledEvaluation, n_members: int, room: Room
    ) -> None:
        """Prepare; the loader is not asked yet.

        Args:
            loader: The labelled batches; every pass must give the same in the same order.
            evaluation: How the model runs.
            n_members: How many there will be.
            room: How much may be held.
        """
        self.loader = loader
        self._evaluation = evaluation
        self._n_members = n_members
        self._room = room
        self._parts: list[_Part] = []
        self._n_labels = self._n_classes = 0
        self._members: list[Scores] = []
        self._ensembles: list[Scores] = []
        self._averages: list[Scores] = []
        self._with_average: list[tuple[float, float]] = []
        self._with_next: list[tuple[float, float]] = []
        self._reliability: dict[str, tuple[ReliabilityBin, ...]] = {}

    def add_member(self, model: nn.Module, *, is_newest: bool) -> None:
        """Let the next member predict; it becomes part of the ensemble.

        Args:
            model: With its weights, in evaluation mode.
            is_newest: Whether it is the newest of all checkpoints.

        Raises:
            ModelError: If the loader gives nothing, or others than before.
            MemoryBudgetError: If the probabilities need too much memory.
        """
        device, n_before = device_of(model), len(self._members)
        alone, together = ProbabilityScores(device), ProbabilityScores(device)
        neighbours = _Comparing(device)
        for part, logs, labels in self._predicted(model):
            probabilities = logs.to(torch.float64).exp()
            loss = negative_log_likelihood(logs, labels)
            guesses = alone.add(probabilities, loss, labels).to(torch.int32)
            if n_before:
                neighbours.add(probabilities - part.before, guesses == part.guesses[-1])
            part.guesses.append(guesses)
            part.total += probabilities
            part.before.copy_(probabilities)
            mean = part.total / (n_before + 1)
            together.add(mean, _loss_of(mean, labels), labels)
        if n_before:
            self._with_next.append(neighbours.found())
        self._members.append(alone.scores())
        self._ensembles.append(together.scores())
        self._reliability["ensemble"] = together.reliability()
        if is_newest:
            self._reliability["newest"] = alone.reliability()

    def add_average(self, model: nn.Module) -> None:
        """Let the average of all members so far predict.

        Args:
            model: With its weights, in evaluation mode.

        Raises:
            ModelError: If the loader gives others than before.
        """
        device, n_members = device_of(model), len(self._members)
        average, comparing = ProbabilityScores(device), _Comparing(device)
        for part, logs, labels in self._predicted(model):
            probabilities = logs.to(torch.float64).exp()
            loss = negative_log_likelihood(logs, labels)
            guesses = average.add(probabilities, loss, labels)
            mean = part.total / n_members
            comparing.add(probabilities - mean, guesses == mean.argmax(dim=1))
            part.guesses_of_average.copy_(guesses)
        self._with_average.append(comparing.found())
        self._averages.append(average.scores())
        self._reliability["average"] = average.reliability()

    def found(self) -> LoaderComparison:
        """Return what was found, once all members and averages are there."""
        with_members = [0] * len(self._members)
        for part in self._parts:
            for number, guesses in enumerate(part.guesses):
                with_members[number] += int((guesses == part.guesses_of_average).sum())
        return LoaderComparison(
            name=self.loader.name,
            n_labels=self._n_labels,
            n_classes=self._n_classes,
            members=tuple(self._members),
            ensembles=tuple(self._ensembles),
            averages=tuple(self._averages),
            agreements=tuple(agreement for _, agreement in self._with_average),
            distances=tuple(distance for distance, _ in self._with_average),
            member_agreements=tuple(100 * equal / self._n_labels for equal in with_members),
            neighbour_agreements=tuple(agreement for _, agreement in self._with_next),
            neighbour_distances=tuple(distance for distance, _ in self._with_next),
            ensemble_reliability=self._reliability["ensemble"],
            average_reliability=self._reliability["average"],
            newest_reliability=self._reliability["newest"],
        )

    def _predicted(self, model: nn.Module) -> Iterator[tuple[_Part, Tensor, Tensor]]:
        """Run a model through the loader; yield logarithms of probabilities, and labels.

        Raises:
            ModelError: If the loader gives nothing, or others than in the pass before.
        """
        is_first, number = not self._parts, 0
        same = torch.ones((), dtype=torch.bool, device=device_of(model))
        with self._evaluation.ready(model):
            for number, batch in enumerate(self._evaluation.batches(self.loader, model), 1):
                output = self._evaluation.output(model, batch)
                logs, labels = log_probabilities(output, labels_of(batch.value))
                if is_first:
                    self._parts.append(self._new_part(logs, labels))
                part = self._parts[number - 1] if number <= len(self._parts) else None
                if part is None or part.total.shape != logs.shape:
                    raise ModelError(self._not_repeated(number))
                same = same.logical_and((labels == part.labels).all())
                yield part, logs, labels
        if not number or not self._n_labels:
            raise ModelError(f"loader '{self.loader.name}': gave no labels{once_only(self.loader)}")
        if number < len(self._parts) or not same:
            raise ModelError(self._not_repeated(None if number == len(self._parts) else number + 1))

    def _new_part(self, logs: Tensor, labels: Tensor) -> _Part:
        n_labels, n_classes = logs.shape
        if self._n_classes not in (0, n_classes):
            raise ModelError(
                f"loader '{self.loader.name}': the model has {n_classes} classes for one batch, "
                f"and {self._n_classes} for those before"
            )
        self._n_labels += n_labels
        self._n_classes = n_classes
        of_classes = n_classes * (_SUM_ITEMSIZE + _PROBABILITY_ITEMSIZE)
        of_label = _LABEL_ITEMSIZE + _GUESS_ITEMSIZE * (self._n_members + 1)
        nbytes = n_labels * (of_classes + of_label)
        self._room.take(self.loader.name, nbytes, self._n_labels, n_classes)
        options: dict[str, Any] = {"device": logs.device}
        return _Part(
            labels=labels.clone(),
            total=torch.zeros(logs.shape, dtype=torch.float64, **options),
            before=torch.empty(logs.shape, dtype=torch.float32, **options),
            guesses_of_average=torch.empty(n_labels, dtype=torch.int32, **options),
        )

    def _not_repeated(self, number: int | None) -> str:
        which = "" if number is None else f"from batch {number} on "
        return (
            f"loader '{self.loader.name}': {which}gives other batches than in the pass before; an "
            "ensemble needs the same in the same order: leave shuffling out"
        )


def _loss_of(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of probabilities, (n, C) float64; at most 708 nats."""
    least = torch.finfo(torch.float64).tiny  # what all members find impossible
    found = probabilities.gather(1, labels[:, None]).squeeze(1)
    return -found.clamp_min(least).log()
