"""Watches what the layers of a model see in one batch.

A BatchNorm layer with momentum 1 leaves the mean and unbiased variance of its input in its buffers
at no extra cost; hooks note when, and how many elements it had. Compiled code calls no hooks: it is
used for batches of a shape that was watched before, and the buffers are read afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ckptavg.batchnorm.batches import Batch, tensors_of
from ckptavg.batchnorm.kept import without_compiled_code
from ckptavg.batchnorm.layers import NormLayer
from ckptavg.batchnorm.moments import BatchMoments
from ckptavg.bn_options import BnOptions
from ckptavg.errors import BatchNormError

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)

Signature = tuple[object, ...]


class TooSmallError(BatchNormError):
    """A batch gives a layer fewer than two values a channel; joined to another it may do."""


class Observer:
    """Runs a model on batches and tells what its layers saw."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, NormLayer],
        options: BnOptions,
        device: torch.device,
    ) -> None:
        """Prepare; the model must be ready for the pass."""
        self._model = model
        self._layers = layers
        self._options = options
        self._device = device
        self._run = options.forward or _default_forward
        self._n_samples = 0
        self._pending: dict[str, tuple[float, int, Tensor, Tensor]] = {}
        self._seen: list[BatchMoments] = []
        self._calls: Counter[str] = Counter()  # of each layer, as far as they are known
        self._compiled: nn.Module | None = None
        self._known: dict[Signature, dict[str, tuple[float, int]]] = {}
        self.notes: list[str] = []

    def observe(self, batch: Batch) -> list[BatchMoments]:
        """Run the model on a batch; several results mean that layers were used several times.

        Raises:
            TooSmallError: If a BatchNorm layer gets fewer than two values a channel.
            BatchNormError: If a layer cannot be watched.
        """
        self._n_samples = batch.n_samples
        self._pending, self._seen = {}, []
        signature = _signature(batch.on_device) if self._options.compile else ()
        if signature in self._known and self._options.compile:
            self._forward(self._compile(), batch)
            for name, (weight, count) in self._known[signature].items():
                layer = self._layers[name]
                self._pending[name] = (weight, count, layer.mean, layer.variance)
                self._calls[name] += 1
        else:
            with self._hooks(), without_compiled_code(self._model):
                self._forward(self._model, batch)
            if self._options.compile:
                self._remember(signature)
        self._flush()
        return self._seen

    def check_compiled(self) -> None:
        """See that compiled code reached the layers that were expected of it.

        Raises:
            BatchNormError: If not.
        """
        if self._compiled is None:
            return
        for name, layer in self._layers.items():
            counter = layer.module.num_batches_tracked
            if counter is not None and int(counter) != self._calls[name]:
                raise BatchNormError(
                    f"layer '{name}' was reached {int(counter)} times, not {self._calls[name]}: "
                    "the model takes other ways for batches of equal shape; leave out compile"
                )

    # -- running

    def _forward(self, model: nn.Module, batch: Batch) -> None:
        autocast: AbstractContextManager[object] = nullcontext()
        if self._options.amp is not None:
            dtype = getattr(torch, self._options.amp)
            autocast = torch.autocast(self._device.type, dtype=dtype)
        # not inference_mode: whatever the model caches would be unfit for training
        with torch.no_grad(), autocast:
            self._run(model, batch.on_device)

    def _compile(self) -> nn.Module:
        if self._compiled is None:
            self._compiled = torch.compile(self._model, dynamic=False)  # type: ignore[assignment]
        compiled = self._compiled
        assert compiled is not None  # just made
        return compiled

    def _remember(self, signature: Signature) -> None:
        """Note what batches of one shape give, if compiled code can be read that way."""
        reasons = {
            "layers are used several times in one forward": bool(self._seen),
            "InstanceNorm layers do not count how often they ran": any(
                layer.is_instance for layer in self._layers.values()
            ),
            "16-bit buffers do not hold statistics": any(
                layer.mean.dtype in _SIXTEEN_BITS for layer in self._layers.values()
            ),
        }
        for reason, holds in reasons.items():
            if holds:
                note = f"the model was not compiled: {reason}"
                self.notes += [] if note in self.notes else [note]
                return
        self._known[signature] = {
            name: (weight, count) for name, (weight, count, _, _) in self._pending.items()
        }

    # -- watching

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        try:
            for layer in self._layers.values():
                before, after = self._before(layer), self._after(layer)
                module = layer.module
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, layer: NormLayer) -> Callable[..., None]:
        name = layer.name

        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if not layer.module.training:
                raise BatchNormError(
                    f"layer '{name}' was put into evaluation mode during the pass; forward must "
                    "leave the training modes alone"
                )
            if name in self._pending:  # used again in this forward: its buffers are overwritten
                self._flush()
            values = _only_input(inputs, named)
            count = layer.n_elements(values)
            if layer.is_instance:
                count //= max(layer.n_instances(values), 1)
                if count < 2:
                    raise BatchNormError(
                        f"layer '{name}' got {count or 'no'} value per channel and instance, which "
                        "has no variance; use larger inputs"
                    )
            elif count < 2:
                raise TooSmallError(
                    f"layer '{name}' got a batch with {count or 'no'} value per channel, which has "
                    "no variance; use larger batches, or drop the last small one"
                )

        return hook

    def _after(self, layer: NormLayer) -> Callable[..., None]:
        def hook(
            module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
        ) -> None:
            values = _only_input(inputs, named)
            # 16-bit buffers cannot hold a batch's statistics: take them from the input
            sixteen = layer.mean.dtype in _SIXTEEN_BITS
            mean, variance = layer.moments_of(values) if sixteen else (layer.mean, layer.variance)
            weight = self._weight(layer, values)
            self._pending[layer.name] = (weight, layer.n_elements(values), mean, variance)
            self._calls[layer.name] += 1

        return hook

    def _weight(self, layer: NormLayer, values: Tensor) -> float:
        """Return how much a layer's input counts; see ``moments``."""
        if self._options.estimator == "torch":
            return 1.0
        if layer.is_instance:
            return layer.n_instances(values)
        if self._options.estimator == "paper":
            return self._n_samples or values.shape[0]
        return layer.n_elements(values)

    def _flush(self) -> None:
        """Take what the layers hold before it is overwritten, all of it in a few operations."""
        pending, self._pending = self._pending, {}
        if not pending:
            return
        self._seen.append(
            BatchMoments(
                weights={name: weight for name, (weight, _, _, _) in pending.items()},
                n_elements={name: count for name, (_, count, _, _) in pending.items()},
                mean=self._end_to_end([mean for _, _, mean, _ in pending.values()]),
                variance=self._end_to_end([variance for _, _, _, variance in pending.values()]),
            )
        )

    def _end_to_end(self, tensors: list[Tensor]) -> Tensor:
        device = next(iter(self._layers.values())).device
        # one dtype: then one copy and one conversion are enough
        if len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1:
            return torch.cat(tensors).to(device, torch.float64)
        return torch.cat([tensor.to(device, torch.float64) for tensor in tensors])


def _only_input(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    value: Tensor = inputs[0] if inputs else named["input"]
    return value


def _signature(batch: Any) -> Signature:
    """Return what compiled code depends on: the shapes, dtypes and form of a batch."""
    return (
        type(batch),
        *((tensor.shape, tensor.dtype, tensor.stride()) for tensor in tensors_of(batch)),
    )


def _default_forward(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise BatchNormError("a batch is an empty tuple or list")
        return model(batch[0])
    if isinstance(batch, Tensor):
        return model(batch)
    raise BatchNormError(
        f"a batch is a {type(batch).__name__}, expected a tensor, a tuple, a list or a mapping; "
        "say how to run the model with forward (--forward)"
    )
