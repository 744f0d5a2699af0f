"""One bad input (or a strange one that is fine), with what must come of it and why."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_SECONDS = 1.0  # to refuse anything
MAX_GROWTH_BYTES = 100_000_000  # of memory, to refuse anything

Build = Callable[[Path], Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input.

    Attributes:
        name: ``group/what-is-wrong``, unique.
        why: The rule of the format that is broken, or the harm that would come of it.
        build: Writes the files below an empty directory; returns the arguments of ``average``, the
            sources (relative to that directory, which is the working directory) and options.
        refusal: Regular expression that is found in the one line of the error; None if the input
            must be averaged.
        culprit: What the error must name: a file, or part of its path; the last source if None, and
            no one file if empty.
        exit_code: Of a refusal: 1, or 2 for wrong usage.
        values: Of an average: tensor name -> its row-major values, for some or all tensors.
    """

    name: str
    why: str
    build: Build
    refusal: str | None
    culprit: str | None = None
    exit_code: int = 1
    values: Mapping[str, Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if self.refusal is not None:
            re.compile(self.refusal)
        elif self.values is None:
            raise ValueError(f"{self.name}: says what is averaged")


def good_safetensors(*values: float) -> bytes:
    """Return a safetensors file with one float32 tensor ``w``; of 1, 2, 3, 4 if none are given."""
    import struct

    from hostile import entry, safetensors_bytes

    numbers = values or (1.0, 2.0, 3.0, 4.0)
    data = struct.pack(f"<{len(numbers)}f", *numbers)
    return safetensors_bytes({"w": entry("F32", [len(numbers)], 0, len(data))}, data)


def alone(content: bytes, filename: str = "bad.safetensors", *options: str) -> Build:
    """Return what builds a good checkpoint, and a second one with this content."""

    def build(directory: Path) -> Sequence[str]:
        (directory / "good.safetensors").write_bytes(good_safetensors())
        (directory / filename).write_bytes(content)
        return ["good.safetensors", filename, *options]

    return build
