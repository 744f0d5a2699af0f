"""The state a model is in during a BatchNorm pass, and what puts everything back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckptavg.batchnorm.layers import NormLayer
from ckptavg.bn_options import BnOptions

_LARGEST_SEED = 2**32  # of numpy's
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@contextmanager
def random_state_kept(model: nn.Module, seed: int | None) -> Iterator[None]:
    """Seed Python's, numpy's and torch's random numbers if asked; restore their states."""
    import numpy as np

    indices = {
        parameter.device.index or 0
        for parameter in model.parameters()
        if parameter.device.type == "cuda"
    }
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(indices)):
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

    The statistics, too: the caller stores the new ones once they are complete. Modes are set by
    attribute, there and back, because ``eval`` of a user's module may do more than that.
    """
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer.module, layer.module.momentum) for layer in layers.values()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        with random_state_kept(model, options.seed):
            if options.train_mode == "bn":
                for module, _ in modes:
                    module.training = False
            elif not model.training:  # in a model in training mode, what is not, is frozen
                for module, _ in modes:
                    module.training = True
            for layer in layers.values():
                layer.module.training = True
                layer.module.momentum = 1.0  # the buffers then hold the last batch's statistics
                layer.module.reset_running_stats()  # 0 x NaN would be NaN
            with _apart(layers), _channels_last(model, wanted=options.channels_last):
                yield
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in momenta:
            norm.momentum = momentum
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                setattr(module, name, buffer)


@contextmanager
def _apart(layers: Mapping[str, NormLayer]) -> Iterator[None]:
    """Let SyncBatchNorm layers not wait for other processes, which have batches of their own."""
    synchronised = [
        layer.module for layer in layers.values() if isinstance(layer.module, nn.SyncBatchNorm)
    ]
    before = [vars(module).get("forward") for module in synchronised]
    try:
        for module in synchronised:
            module.forward = MethodType(_BatchNorm.forward, module)  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in zip(synchronised, before, strict=True):
            if forward is not None:
                module.forward = forward  # type: ignore[method-assign]
            else:
                vars(module).pop("forward", None)


@contextmanager
def _channels_last(model: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Lay weights of convolutions out with channels last; then put the very same tensors back."""
    weights = [
        (parameter, parameter.data)
        for parameter in model.parameters()
        if wanted and parameter.dim() in _CHANNELS_LAST
    ]
    try:
        for parameter, data in weights:
            parameter.data = data.to(memory_format=_CHANNELS_LAST[data.dim()])
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
