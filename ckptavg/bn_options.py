"""How a BatchNorm pass runs, and what its options may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, get_args

from ckptavg.errors import UsageError

if TYPE_CHECKING:  # importing torch takes longer than averaging most models
    from torch import nn

Estimator = Literal["population", "paper", "torch"]
TrainMode = Literal["bn", "model"]
Amp = Literal["bfloat16", "float16"]
_N_SEEDS = 2**64  # torch's
Forward = Callable[["nn.Module", Any], object]


@dataclass(frozen=True, kw_only=True)
class BnOptions:
    """How a BatchNorm pass runs; the defaults are what most people want.

    Attributes:
        forward: ``forward(model, batch)`` runs the model; None passes tensors and first items of
            tuples as they are, and mappings as keyword arguments.
        estimator: ``population``, ``paper`` or ``torch``; see ``ckptavg.batchnorm.moments``.
        train_mode: ``bn`` puts only the layers to be recomputed in training mode, so dropout stays
            off; ``model`` the whole model, as the paper's code and torch do.
        max_batches, max_samples: Where to stop; None uses all data.
        until_converged: Stop once the last tenth of the data moved no statistic by more than this,
            relative to its spread, such as 0.01; None does not look.
        allow_unreached: Leave layers that the data never reaches as they are, instead of an error.
        amp: Run the model under autocast to this dtype; statistics are float64 all the same.
        channels_last: Run convolutions with channels last in memory, which GPUs prefer.
        compile: Run the model through ``torch.compile``, for batches of a shape seen before.
        seed: Seeds Python's, numpy's and torch's random numbers during the pass, such as those
            that shuffle the data; their states are restored in any case.
        data_per_process: With several processes: the data of each is its own share already. Else
            every process goes through the same data, and they take turns.

    Raises:
        UsageError: If a value makes no sense.
    """

    forward: Forward | None = None
    estimator: Estimator = "population"
    train_mode: TrainMode = "bn"
    max_batches: int | None = None
    max_samples: int | None = None
    until_converged: float | None = None
    allow_unreached: bool = False
    amp: Amp | None = None
    channels_last: bool = False
    compile: bool = False
    seed: int | None = None
    data_per_process: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("estimator", self.estimator, get_args(Estimator)),
            ("train_mode", self.train_mode, get_args(TrainMode)),
            ("amp", self.amp, (None, *get_args(Amp))),
        ):
            if value not in allowed:
                allowed = tuple(one for one in allowed if one is not None)
                raise UsageError(f"{name}: '{value}' is not one of {', '.join(allowed)}")
        for name, limit in (("max_batches", self.max_batches), ("max_samples", self.max_samples)):
            if limit is not None and (not _is_count(limit) or limit < 1):
                raise UsageError(f"{name} is {limit}, expected at least 1")
        if self.seed is not None and not 0 <= self.seed < _N_SEEDS:
            raise UsageError(f"seed is {self.seed}, expected 0 to {_N_SEEDS - 1}")
        if self.until_converged is not None and not 0 < self.until_converged < 1:
            raise UsageError(
                f"until_converged is {self.until_converged}, expected a share such as 0.01"
            )

    def chosen(self) -> dict[str, Any]:
        """Return the options that are not the default, as far as JSON can express them."""
        return {
            one.name: getattr(self, one.name)
            for one in fields(BnOptions)
            if one.name != "forward" and getattr(self, one.name) != one.default
        }


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # numpy's numbers, too
