"""What an ensemble of checkpoints and their weight average say: values to print, draw and keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Members = Literal["stored", "recomputed"]
Order = Literal["oldest", "newest"]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How good predicted probabilities are.

    Attributes:
        accuracy, error: Percentages of the labels that are, or are not, the most probable class.
        nll: Mean negative log-likelihood, in nats per label.
        ece: Expected calibration error in percent: how far the probability of the most probable
            class is from the share of labels that it gets right, bin by bin (Guo et al. 2017,
            equation 3, with 15 bins of equal width).
    """

    accuracy: float
    error: float
    nll: float
    ece: float


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """Predictions whose most probable class is about equally probable.

    Attributes:
        low, high: What its probability is above, and at most.
        count: How many predictions there are.
        confidence: Mean probability of the most probable class, in percent; None without any.
        accuracy: Percentage of them that are right; None without any.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class LoaderComparison:
    """Ensemble and weight average on one loader.

    The members come in the order in which they were added. Agreement is the percentage of labels
    for which two predict the same class; the distance of two is the mean over labels of the
    Euclidean norm of the difference of their probabilities (0 to the root of 2).

    Attributes:
        name: The loader's.
        n_labels: How many labels it has.
        n_classes: How many classes.
        members: Scores of each checkpoint by itself.
        ensembles: Scores of the mean of the probabilities of the first 1, 2, ... members.
        averages: Scores of the mean of the weights of the first 1, 2, ... members.
        agreements: Of ensemble and average of the first 1, 2, ... members.
        distances: Likewise; O(D^2), D being the distance of members in the space of weights
            (Izmailov et al. 2018, section 3.5).
        member_agreements: Of the average of all with each member.
        neighbour_agreements: Of each member with the next: one less than there are members.
        neighbour_distances: Likewise; O(D).
        ensemble_reliability, average_reliability: Of all members together.
        newest_reliability: Of the newest checkpoint by itself.
    """

    name: str
    n_labels: int
    n_classes: int
    members: tuple[Scores, ...]
    ensembles: tuple[Scores, ...]
    averages: tuple[Scores, ...]
    agreements: tuple[float, ...]
    distances: tuple[float, ...]
    member_agreements: tuple[float, ...]
    neighbour_agreements: tuple[float, ...]
    neighbour_distances: tuple[float, ...]
    ensemble_reliability: tuple[ReliabilityBin, ...]
    average_reliability: tuple[ReliabilityBin, ...]
    newest_reliability: tuple[ReliabilityBin, ...]

    @property
    def mean_member(self) -> Scores:
        """The mean of the members' scores."""
        n_members = len(self.members)
        return Scores(
            accuracy=sum(one.accuracy for one in self.members) / n_members,
            error=sum(one.error for one in self.members) / n_members,
            nll=sum(one.nll for one in self.members) / n_members,
            ece=sum(one.ece for one in self.members) / n_members,
        )


@dataclass(frozen=True, kw_only=True)
class EnsembleMember:
    """One checkpoint of an ensemble.

    Attributes:
        source: What it is called.
        step, epoch: Where in training it was saved, where that is known.
        weight_distance: Euclidean distance of its parameters from their mean over all members.
    """

    source: str
    step: int | None
    epoch: int | None
    weight_distance: float


@dataclass(frozen=True, kw_only=True)
class EnsembleResult:
    """An ensemble of checkpoints against the average of their weights.

    Attributes:
        output: The directory with numbers and pictures.
        members: The checkpoints, in the order in which they were added.
        order: Whether the oldest or the newest was the first.
        bn_statistics: Whether members ran with the BatchNorm statistics that they were stored
            with, or with recomputed ones; None without BatchNorm layers. Averages always had
            recomputed ones.
        loaders: What was found, by loader.
        summary: What was found, one sentence each.
        notes: What the user should know, one sentence each.
        files: The files in the output.
        device: Where the models ran.
        held_nbytes: Bytes of probabilities and labels that were held at the end.
        seconds: Wall time.
    """

    output: Path
    members: tuple[EnsembleMember, ...]
    order: Order
    bn_statistics: Members | None
    loaders: tuple[LoaderComparison, ...]
    summary: tuple[str, ...]
    notes: tuple[str, ...]
    files: tuple[str, ...]
    device: str
    held_nbytes: int
    seconds: float

    @property
    def newest(self) -> int:
        """Number of the newest checkpoint among the members."""
        return len(self.members) - 1 if self.order == "oldest" else 0
