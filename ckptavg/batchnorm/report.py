"""What a BatchNorm pass tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class BnLayerReport:
    """How far the statistics of one layer moved.

    Attributes:
        name: Module name in the model.
        n_features: Number of channels.
        n_elements: Elements per channel that went in.
        mean_shift: Largest change of ``running_mean`` over the channels, in new standard
            deviations.
        variance_ratio: Smallest and largest ratio of new to old ``running_var``.
        late_change: How far the end of the pass moved this layer, as in ``BnConvergence.change``;
            None where that is not known.
    """

    name: str
    n_features: int
    n_elements: int
    mean_shift: float
    variance_ratio: tuple[float, float]
    late_change: float | None = None


@dataclass(frozen=True, slots=True)
class BnConvergence:
    """How far the end of a pass still moved the statistics: whether it saw enough data.

    Attributes:
        share: The part of the data at the end that is meant: a tenth, or more in a short pass.
        change: Largest change over all channels of all layers: of a mean in standard deviations,
            or of a variance relative to itself. Of several processes the largest.
    """

    share: float
    change: float


@dataclass(frozen=True, slots=True)
class BnReport:
    """What a pass over batches did.

    Attributes:
        layers: The layers recomputed, in the order of the model.
        n_batches: Batches used, of all processes together.
        n_samples: Samples used, likewise.
        skipped: Module name -> why its statistics were left alone, as in "is frozen".
        seconds: Wall time.
        estimator: The estimator's name.
        convergence: Whether it was enough data; None after a single batch.
        wait_seconds: How much of ``seconds`` the pass waited for the loader's batches.
        n_processes: How many processes shared the pass.
        notes: What the user should know, one sentence each.
        options: How it ran, as far as that is not the default.
    """

    layers: tuple[BnLayerReport, ...]
    n_batches: int
    n_samples: int
    skipped: Mapping[str, str]
    seconds: float
    estimator: str = "population"
    convergence: BnConvergence | None = None
    wait_seconds: float = 0.0
    n_processes: int = 1
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
