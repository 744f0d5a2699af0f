"""Watches what the layers of a model see in one batch.

A BatchNorm layer with momentum 1 leaves the mean and unbiased variance of its input in its buffers
at no extra cost; hooks note when, and how many elements it had. Compiled code is used for batches
of a shape that was watched before: it only counts what each layer gets, the buffers are read
afterwards, and at the end the counts must have been those of the batch that was watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from ckptavg.batchnorm.batches import Batch
from ckptavg.batchnorm.kept import without_compiled_code
from ckptavg.batchnorm.layers import NormLayer
from ckptavg.batchnorm.moments import BatchMoments
from ckptavg.bn_options import BnOptions
from ckptavg.errors import BatchNormError

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
_CALL = 2**40  # counts the calls of a layer above its elements
_OWN_WAY = 0.01  # what precision may explain; a way of its own is further off
_NUMBERS = (bool, int, float)

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
        self._run = options.forward or default_forward
        self._n_samples: int | None = None
        self._pending: dict[str, tuple[float, int, Tensor, Tensor]] = {}
        self._seen: list[BatchMoments] = []
        self._compiled: _Compiled | None = None
        self._known: dict[Signature, dict[str, tuple[float, int]]] = {}
        # whether a layer's buffers do not hold what it saw; None: to be seen
        self._from_input: dict[str, bool | None] = {
            name: True
            if layer.mean.dtype in _SIXTEEN_BITS
            else (None if layer.has_own_forward else False)
            for name, layer in layers.items()
        }
        self._error: BatchNormError | None = None
        self.notes: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._compiled is not None:
            self._compiled.close()

    def observe(self, batch: Batch) -> list[BatchMoments]:
        """Run the model on a batch; several results mean that layers were used several times.

        Raises:
            TooSmallError: If a BatchNorm layer gets fewer than two values a channel.
            BatchNormError: If a layer cannot be watched.
        """
        self._n_samples = batch.n_samples
        self._pending, self._seen = {}, []
        signature = _signature(batch.on_device) if self._options.compile else None
        known = None if signature is None else self._known.get(signature)
        if known is not None:
            if self._compiled is None:
                self._compiled = _Compiled(self._model, self._layers)
            counts = {name: count for name, (_, count) in known.items()}
            with self._compiled.checking(counts):
                self._forward(self._compiled.model, batch)
            for name, (weight, count) in known.items():
                layer = self._layers[name]
                self._pending[name] = (weight, count, layer.mean, layer.variance)
        else:
            with self._hooks(), without_compiled_code(self._model):
                self._forward(self._model, batch)
            if self._options.compile:
                self._remember(signature)
        self._flush()
        return self._seen

    def check_compiled(self) -> None:
        """See that compiled code gave the layers what was expected of it; waits for a GPU.

        Raises:
            BatchNormError: If not.
        """
        if self._options.compile and self._compiled is None and not self.notes:
            self.notes.append("the model was not compiled: no two batches were alike")
        if self._compiled is not None and (name := self._compiled.surprised()) is not None:
            raise BatchNormError(
                f"layer '{name}' got other numbers of values than before from a batch of equal "
                "shape: what the model does depends on the data; leave out compile"
            )

    # -- running

    def _forward(self, model: nn.Module, batch: Batch) -> None:
        autocast: AbstractContextManager[object] = nullcontext()
        if self._options.amp is not None:
            dtype = getattr(torch, self._options.amp)
            autocast = torch.autocast(self._device.type, dtype=dtype)
        # not inference_mode: whatever the model caches would be unfit for training
        self._error = None
        with torch.no_grad(), autocast:
            self._run(model, batch.on_device)
        if self._error is not None:  # the user's forward caught it
            raise self._error

    def _remember(self, signature: Signature | None) -> None:
        """Note what batches of one shape give, if compiled code can be read that way."""
        reasons = {
            "a batch holds more than tensors and plain values": signature is None,
            "layers are used several times in one forward": bool(self._seen),
            "InstanceNorm layers count by instances": any(
                layer.is_instance for layer in self._layers.values()
            ),
            "buffers do not hold what a layer saw": any(self._from_input.values()),
        }
        for reason, holds in reasons.items():
            if holds:
                note = f"the model was not compiled: {reason}"
                self.notes += [] if note in self.notes else [note]
                return
        assert signature is not None  # that was the first reason
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
            try:
                check(_only_input(inputs, named))
            except BatchNormError as error:
                self._error = error
                raise

        def check(values: Tensor) -> None:
            if not layer.module.training:
                raise BatchNormError(
                    f"layer '{name}' was put into evaluation mode during the pass; forward must "
                    "leave the training modes alone"
                )
            if name in self._pending:  # used again in this forward: its buffers are overwritten
                self._flush()
            count = layer.n_elements(values)
            if layer.is_instance and count:
                count //= layer.n_instances(values)
                if count < 2:
                    raise BatchNormError(
                        f"layer '{name}' got {count} value per channel and instance, which has no "
                        "variance; use larger inputs"
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
            if self._from_input[layer.name] is None:
                self._from_input[layer.name] = not _buffers_hold(layer, values)
            mean, variance = layer.mean, layer.variance
            if self._from_input[layer.name]:
                mean, variance = layer.moments_of(values, torch.float64)
            weight = self._weight(layer, values)
            self._pending[layer.name] = (weight, layer.n_elements(values), mean, variance)

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
        # one dtype: then one copy and one conversion are enough
        if len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1:
            return torch.cat(tensors).to(self._device, torch.float64)
        return torch.cat([tensor.to(self._device, torch.float64) for tensor in tensors])


class _Compiled:
    """A compiled model that counts, on the device, what its layers get: nothing waits for it."""

    def __init__(self, model: nn.Module, layers: Mapping[str, NormLayer]) -> None:
        self._layers = layers
        self._counters = {
            name: torch.zeros((), dtype=torch.int64, device=layer.device)
            for name, layer in layers.items()
        }
        self._expected: dict[tuple[int, ...], Tensor] = {}  # kept: copying makes a GPU wait
        self._surprise = torch.zeros(len(layers), dtype=torch.bool, device=self._device)
        # hooks that are there before are compiled, too
        self._handles = [
            layer.module.register_forward_pre_hook(
                _counting(layer, self._counters[name]), with_kwargs=True
            )
            for name, layer in layers.items()
        ]
        self.model: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]

    @property
    def _device(self) -> torch.device:
        return next(iter(self._layers.values())).device

    @contextmanager
    def checking(self, counts: Mapping[str, int]) -> Iterator[None]:
        """Note if the model, run meanwhile, gives a layer another number of values."""
        expected = tuple(counts[name] + _CALL if name in counts else 0 for name in self._layers)
        if expected not in self._expected:
            self._expected[expected] = torch.tensor(expected, device=self._device)
        for counter in self._counters.values():
            counter.zero_()
        yield
        found = torch.stack([one.to(self._device) for one in self._counters.values()])
        self._surprise |= found != self._expected[expected]

    def surprised(self) -> str | None:
        """Return the first layer that got another number of values than expected; None if none."""
        found = self._surprise.tolist()
        return next((name for name, one in zip(self._layers, found, strict=True) if one), None)

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def _buffers_hold(layer: NormLayer, values: Tensor) -> bool:
    """Tell whether a layer that runs in its own way left an input's statistics in its buffers."""
    mean, variance = layer.moments_of(values, torch.float32)
    spread = (variance + layer.epsilon).sqrt()
    shift = ((layer.mean - mean).abs() / spread).max()
    ratio = ((layer.variance + layer.epsilon) / (variance + layer.epsilon) - 1).abs().max()
    return bool((shift < _OWN_WAY) & (ratio < _OWN_WAY))


def _counting(layer: NormLayer, counter: Tensor) -> Callable[..., None]:
    n_features = layer.n_features

    def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        counter.add_(_only_input(inputs, named).numel() // n_features + _CALL)

    return hook


def _only_input(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    value: Tensor = inputs[0] if inputs else next(iter(named.values()))
    return value


def _signature(batch: Any) -> Signature | None:
    """Return what a model's way may depend on, as far as it can be seen; None if it cannot."""
    if isinstance(batch, Tensor):
        return (tuple(batch.shape), batch.dtype, batch.stride())
    if isinstance(batch, Mapping):
        parts: list[Any] = list(batch.values())
        form: tuple[object, ...] = (type(batch), *batch)
    elif isinstance(batch, (tuple, list)):
        parts, form = list(batch), (type(batch),)
    else:
        # a text, such as a file's name, is as good as any
        return (
            (type(batch), batch if isinstance(batch, _NUMBERS) else None)
            if (isinstance(batch, (*_NUMBERS, str, bytes, type(None))))
            else None
        )
    signatures = [_signature(part) for part in parts]
    return None if None in signatures else (*form, *signatures)


def default_forward(model: nn.Module, batch: Any) -> object:
    """Run a model on a batch: a tensor, the first item of a tuple, a mapping as keyword arguments.

    Raises:
        BatchNormError: If the batch is of another form.
    """
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
