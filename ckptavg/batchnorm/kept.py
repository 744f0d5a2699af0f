"""The state a model is in during a BatchNorm pass, and what puts everything back."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckptavg.batchnorm.batches import CHANNELS_LAST
from ckptavg.batchnorm.layers import NormLayer
from ckptavg.bn_options import BnOptions

_LARGEST_SEED = 2**32  # of numpy's
_SHARES_BUFFERS = nn.parallel.DistributedDataParallel


@contextmanager
def random_state_kept(seed: int | None) -> Iterator[None]:
    """Seed Python's, numpy's and torch's random numbers if asked; restore their states."""
    import numpy as np

    # what torch.manual_seed seeds, it seeds on every GPU that this process uses
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch has no types
    indices = range(torch.cuda.device_count() if in_use else 0)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=indices):
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % _LARGEST_SEED)
                torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def ready_for_pass(
    model: nn.Module, layers: Mapping[str, NormLayer], options: BnOptions
) -> Iterator[None]:
    """Put the model into the state for the pass; put everything back, whatever happens.

    The statistics, too: the caller stores the new ones once they are complete.
    """
    momenta = [(layer.module, layer.module.momentum) for layer in layers.values()]
    try:
        with random_state_kept(options.seed), modes_kept(model), buffers_kept(model):
            if options.train_mode == "bn":
                set_modes(model, training=False)
            elif not model.training:  # in a model in training mode, what is not, is frozen
                set_modes(model, training=True)
            for layer in layers.values():
                layer.module.training = True
                layer.module.momentum = 1.0  # the buffers then hold the last batch's statistics
                layer.module.reset_running_stats()  # 0 x NaN would be NaN
            with (
                _apart(model),
                _unshared_buffers(model),
                convolutions_channels_last(model, wanted=options.channels_last),
            ):
                yield
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum


def set_modes(model: nn.Module, *, training: bool) -> None:
    """Set the mode of every module by attribute: ``eval`` of a user's module may do more."""
    for module in model.modules():
        module.training = training


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore the training mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore what all buffers hold, and which tensors they are."""
    buffers = [
        (module, name, buffer, None if _is_expanded(buffer) else buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer)
                if value is not None:
                    buffer.copy_(value)


def _is_expanded(buffer: torch.Tensor) -> bool:
    """Tell whether elements share memory: then nothing can have been written into it."""
    return any(
        stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True)
    )


@contextmanager
def _apart(model: nn.Module) -> Iterator[None]:
    """Let SyncBatchNorm layers not wait for other processes, which have batches of their own."""
    synchronised = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    before = [vars(module).get("forward") for module in synchronised]
    try:
        for module in synchronised:
            module.forward = _forward_apart(module)  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in zip(synchronised, before, strict=True):
            if forward is not None:
                module.forward = forward  # type: ignore[method-assign]
            else:
                vars(module).pop("forward", None)


@contextmanager
def _unshared_buffers(model: nn.Module) -> Iterator[None]:
    """Let parts of the model that DDP wraps not wait for other processes either."""
    wrappers = [module for module in model.modules() if isinstance(module, _SHARES_BUFFERS)]
    before = [wrapper.broadcast_buffers for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.broadcast_buffers = False
        yield
    finally:
        for wrapper, value in zip(wrappers, before, strict=True):
            wrapper.broadcast_buffers = value


def _forward_apart(module: nn.SyncBatchNorm) -> Callable[..., Any]:
    own = type(module).forward
    if own is nn.SyncBatchNorm.forward:
        return MethodType(_BatchNorm.forward, module)

    def forward(*inputs: Any, **named: Any) -> Any:
        """Run a subclass's own forward, which calls that of SyncBatchNorm."""
        with patch.object(nn.SyncBatchNorm, "forward", _BatchNorm.forward):
            return own(module, *inputs, **named)

    return forward


@contextmanager
def convolutions_channels_last(model: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Lay weights of convolutions out with channels last; then put the very same tensors back."""
    weights = [
        (parameter, parameter.data)
        for parameter in model.parameters()
        if wanted and parameter.dim() in CHANNELS_LAST
    ]
    try:
        for parameter, data in weights:
            parameter.data = data.to(memory_format=CHANNELS_LAST[data.dim()])
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data


def without_compiled_code(model: nn.Module) -> AbstractContextManager[None]:
    """Run what the user compiled as it was written: compiled code does not call our hooks."""
    compiled = any(vars(module).get("_compiled_call_impl") for module in model.modules())
    if not compiled and "torch._dynamo" not in sys.modules:
        return nullcontext()  # importing that takes longer than most passes
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
