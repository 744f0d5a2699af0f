"""What comparing checkpoints gives: values for the command line to print and for Python to read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class TrajectoryPoint:
    """Where one checkpoint lies.

    Attributes:
        source: Its label.
        step, epoch: Where in training it was saved, where that is known.
        norm: Length of its weights.
        deviation: Distance from the mean.
        step_length: Distance from the one before it; None for the first.
        nearest: Distance from the nearest other one.
        coordinates: Along the first principal components.
    """

    source: str
    step: int | None
    epoch: int | None
    norm: float
    deviation: float
    step_length: float | None
    nearest: float
    coordinates: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class LayerDrift:
    """How one layer moved.

    Attributes:
        name: What its tensors' names begin with.
        n_elements: How many weights it has.
        norm: Length of its mean.
        spread: Root mean square distance of its checkpoints from the mean.
        moved: Distance between the first and the last.
        drift_share: Part of its variance that a straight line in time explains.
        taken_back: Part of a way that the next one takes back; None for fewer than three.
        variance_share: Its part of the variance of all weights.
        gram: Inner products of its deviations.
    """

    name: str
    n_elements: int
    norm: float
    spread: float
    moved: float
    drift_share: float
    taken_back: float | None
    variance_share: float
    gram: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class TrajectoryResult:
    """What the weights of checkpoints say of each other.

    Lengths and distances are Euclidean, over all weights: floating-point tensors but BatchNorm
    statistics, tied ones once. Rows and columns are in the order of ``checkpoints``.

    Attributes:
        kind: ``unrelated``, ``equal``, ``converging``, ``bouncing``, ``drifting`` or ``pair``.
        summary: The verdict, one sentence each.
        checkpoints: Oldest first.
        n_elements: How many weights were compared.
        mean_norm: Length of the mean.
        norm_ratio: That over the mean of the lengths.
        spread: Root mean square distance from the mean.
        effective_count: How many independent checkpoints the mean is worth, but for the drift.
        taken_back: Part of a way of ``taken_back_lag`` checkpoints that the next one takes back;
            None for fewer than three.
        drift_share: Part of the variance that a straight line in time explains.
        step_cosine: Mean cosine between one step and the next; None for fewer than three.
        explained: Part of the variance that each principal component explains.
        runs: Labels of checkpoints that belong together.
        outliers: Labels of those far from all others.
        duplicates: Labels of pairs with the same weights.
        gram: Inner products of the deviations from the mean.
        distances, cosines: Between the weights.
        layers: In the order of the model.
        device, read_nbytes, peak_host_bytes, peak_device_bytes: As in ``AverageResult``.
        seconds: Wall time of the pass over the checkpoints.
        notes: What the user should know.
        output: The directory with the files; None if none was asked for.
        files: Their names.
    """

    kind: str
    summary: tuple[str, ...]
    checkpoints: tuple[TrajectoryPoint, ...]
    n_elements: int
    mean_norm: float
    norm_ratio: float
    spread: float
    effective_count: float
    taken_back: float | None
    taken_back_lag: int | None
    drift_share: float
    step_cosine: float | None
    explained: tuple[float, ...]
    runs: tuple[tuple[str, ...], ...]
    outliers: tuple[str, ...]
    duplicates: tuple[tuple[str, ...], ...]
    gram: tuple[tuple[float, ...], ...]
    distances: tuple[tuple[float, ...], ...]
    cosines: tuple[tuple[float, ...], ...]
    layers: tuple[LayerDrift, ...]
    device: str
    seconds: float
    read_nbytes: int
    peak_host_bytes: int | None
    peak_device_bytes: int | None
    notes: tuple[str, ...]
    output: Path | None = None
    files: tuple[str, ...] = field(default=())
