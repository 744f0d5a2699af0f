"""What the commands take and give: values for the CLI to print and for Python to read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptavg.errors import UsageError
from ckptavg.tensors import FileStamp, TensorInfo

if TYPE_CHECKING:  # importing torch takes longer than averaging most models
    from torch import nn

    from ckptavg.batchnorm import BnReport, Forward

Source = str | Path
Progress = Callable[[str, int, int | None], None]  # stage, done since the last call, total


@dataclass(frozen=True, kw_only=True)
class BnPass:
    """A model and the data to recompute its BatchNorm statistics with.

    Attributes:
        model: The module, or a function without arguments that builds it. Its weights are replaced.
        batches: An iterable of batches, or a function without arguments that returns one.
        forward: ``forward(model, batch)`` runs the model; None passes tensors and first items of
            tuples as they are, and mappings as keyword arguments.
        max_batches, max_samples: Where to stop; None uses all data.
    """

    model: nn.Module | Callable[[], nn.Module]
    batches: Iterable[Any] | Callable[[], Iterable[Any]]
    forward: Forward | None = None
    max_batches: int | None = None
    max_samples: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_batches", self.max_batches), ("max_samples", self.max_samples)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class AverageResult:
    """What a run did.

    Attributes:
        output: The published directory.
        n_checkpoints: How many checkpoints went in.
        device: Where the arithmetic ran.
        read_nbytes, written_nbytes: Bytes of tensor data.
        seconds: Wall time of everything; ``average_seconds`` of reading, averaging and writing.
        peak_host_bytes: Largest resident memory of the process; None where it cannot be told.
        peak_device_bytes: Largest memory allocated on the CUDA device; None on a CPU.
        differing: Integer and bool tensors that differed and were taken from ``taken_from``.
        notes: What the user should know.
        batchnorm: What the BatchNorm pass did; None without one.
    """

    output: Path
    n_checkpoints: int
    device: str
    read_nbytes: int
    written_nbytes: int
    seconds: float
    average_seconds: float
    peak_host_bytes: int | None
    peak_device_bytes: int | None
    differing: tuple[str, ...]
    taken_from: str
    notes: tuple[str, ...]
    batchnorm: BnReport | None


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What the headers of one checkpoint tell."""

    source: str
    layout: str
    step: int | None
    epoch: int | None
    nbytes: int
    n_parameters: int
    files: tuple[FileStamp, ...]
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())
