"""The order in which checkpoints are named changes no bit of what they are averaged to."""

import struct
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hostile import entry, safetensors_bytes

from ckptavg import average_checkpoints
from faults.tally import CountCases

_NUMEL = 3000


def content(code: str, seed: int) -> bytes:
    """Return values as a training run leaves them: near each other, of very different sizes."""
    first = np.random.default_rng(0)
    base = first.normal(size=_NUMEL) * 10.0 ** first.integers(-4, 3, size=_NUMEL)
    values = base * (1 + 0.05 * np.random.default_rng(seed + 1).normal(size=_NUMEL))
    single = values.astype("<f4")
    raw = {
        "F64": values.astype("<f8"),
        "F32": single,
        "F16": values.astype("<f2"),
        "BF16": (single.view("<u4") >> 16).astype("<u2"),
        "C64": np.stack([single, single[::-1]], 1),
    }[code].tobytes()
    return safetensors_bytes({"w": entry(code, [_NUMEL], 0, len(raw))}, raw)


def averages(code: str, directory: Path) -> Sequence[bytes]:
    """Return the data of the average of four checkpoints, named in every order."""
    names = [directory / f"{letter}.safetensors" for letter in "abcd"]
    for seed, path in enumerate(names):
        path.write_bytes(content(code, seed))
    found = []
    for number, order in enumerate(permutations(names)):
        average_checkpoints(order, directory / f"out-{number}")
        raw = (directory / f"out-{number}" / "model.safetensors").read_bytes()
        found.append(raw[8 + int(struct.unpack("<Q", raw[:8])[0]) :])
    return found


@pytest.mark.promise(12)
@pytest.mark.parametrize("code", ["F32", "F16", "BF16", "C64"])
def test_any_order_gives_the_same_bits(code: str, tmp_path: Path, count_cases: CountCases) -> None:
    found = averages(code, tmp_path)
    assert len({*found}) == 1
    count_cases(len(found))


@pytest.mark.promise(12)
def test_float64_which_is_summed_in_its_own_dtype_differs_in_the_last_bits_at_most(
    tmp_path: Path, count_cases: CountCases
) -> None:
    found = [np.frombuffer(raw, "<f8") for raw in averages("F64", tmp_path)]
    for one in found:
        np.testing.assert_allclose(one, found[0], rtol=2.0**-51, atol=0)
    count_cases(len(found))
