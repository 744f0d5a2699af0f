"""Which layers of a model have statistics to recompute, and what each of them counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from ckptavg.errors import BatchNormError

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "AveragedModel")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's model inside what ``torch.compile``, DDP or an averaging wrapper made."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module) or (
            any(kind.__name__ in _WRAPPERS for kind in type(model).__mro__)
            and isinstance(inner := getattr(model, "module", None), nn.Module)
        ):
            model = inner
        else:
            return model


@dataclass(frozen=True, slots=True)
class NormLayer:
    """A layer that keeps running statistics.

    Attributes:
        name: Module name in the model.
        module: A BatchNorm or InstanceNorm layer of any dimension, or a subclass.
    """

    name: str
    module: _BatchNorm | _InstanceNorm

    @property
    def is_instance(self) -> bool:
        """Whether every instance is normalised by itself."""
        return isinstance(self.module, _InstanceNorm)

    @property
    def n_features(self) -> int:
        """Number of channels."""
        return self.mean.numel()

    @property
    def epsilon(self) -> float:
        """What is added to the variance."""
        return self.module.eps

    @property
    def mean(self) -> Tensor:
        """The buffer ``running_mean``."""
        mean = self.module.running_mean
        assert mean is not None  # find_layers takes no layer without
        return mean

    @property
    def variance(self) -> Tensor:
        """The buffer ``running_var``."""
        variance = self.module.running_var
        assert variance is not None  # likewise
        return variance

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.mean.device

    def n_elements(self, values: Tensor) -> int:
        """Return the elements per channel of an input."""
        return values.numel() // self.n_features

    def n_instances(self, values: Tensor) -> int:
        """Return how many instances an input holds; one where it has no batch dimension."""
        if isinstance(self.module, _InstanceNorm):
            no_batch_dim: int = self.module._get_no_batch_dim()  # type: ignore[no-untyped-call]
            if values.dim() == no_batch_dim:
                return 1
        return values.shape[0]

    @property
    def has_own_forward(self) -> bool:
        """Whether the layer's class, or somebody else, changed how it runs."""
        forward = getattr(self.module.forward, "__func__", None)
        return forward not in (_BatchNorm.forward, _InstanceNorm.forward)

    def moments_of(self, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute what the layer would keep of an input, from the input itself."""
        values = values.to(dtype)
        if not self.is_instance:
            dims = [dim for dim in range(values.dim()) if dim != 1]
            variance, mean = torch.var_mean(values, dims)
            return mean, variance
        rows = values.reshape(self.n_instances(values), self.n_features, -1)
        variance, mean = torch.var_mean(rows, 2)
        return mean.mean(0), variance.mean(0)


def find_layers(model: nn.Module) -> tuple[dict[str, NormLayer], dict[str, str]]:
    """Return the layers to recompute by name, and why others are left alone.

    Raises:
        BatchNormError: If a layer is lazy and was never run.
    """
    layers: dict[str, NormLayer] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (_BatchNorm, _InstanceNorm)):
            if _keeps_statistics(module):
                kind = type(module).__name__
                frozen = kind.startswith("Frozen")
                skipped[name] = (
                    f"is frozen: a {kind}"
                    if frozen
                    else f"is a {kind}, of no kind that is known; its statistics are left alone"
                )
        elif module.running_mean is None:
            if isinstance(module, _BatchNorm):  # an InstanceNorm usually keeps none
                skipped[name] = "keeps no running statistics"
        elif not module.track_running_stats:  # turned off later: it uses them, never updates
            skipped[name] = "is frozen: track_running_stats is off"
        elif model.training and not module.training:
            skipped[name] = "is frozen: in evaluation mode inside a model in training mode"
        elif is_lazy(module.running_mean):
            raise BatchNormError(f"layer '{name}' is lazy and was never run: run one batch first")
        else:
            layers[name] = NormLayer(name, module)
    return layers, skipped


def _keeps_statistics(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_buffers(recurse=False)}
    return {"running_mean", "running_var"} <= names
