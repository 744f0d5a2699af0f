"""What ckptavg is measured against, each a whole process.

    python -m tests.benchmarks.peers NAME SOURCES... -o OUT [--device cuda] [--outputs N]

floor                reads every byte of every source, writes one checkpoint's size, syncs
writing              writes N files of one checkpoint's size, syncs; tells the seconds
naive                load_file (or torch.load) each, sum in float32, divide, cast back, save_file
sum-in-stored-dtype  the method of fairseq's script: torch.load, sums as stored, torch.save
float64-sums         the method of timm's script: torch.load, float64 sums, float32 out, torch.save

Only the first two sync what they write. What a peer tells, it prints as one JSON object. Only os
and sys are imported for all: the floor takes no longer to start than Python does.
"""
# ruff: noqa: PTH103, PTH112, PTH118, PTH208

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 20


def floor(sources: list[str], output: str) -> None:
    """Read everything and write one checkpoint's size, on one thread through one small buffer."""
    buffer = _page_aligned()
    for source in sources:
        for path in _files(source):
            descriptor = os.open(path, os.O_RDONLY)
            offset = 0
            while count := os.preadv(descriptor, [buffer], offset):
                offset += count
            os.close(descriptor)
    _write(f"{output}/model.safetensors", _nbytes(sources[0]), buffer)


def _page_aligned() -> memoryview:
    """Return a buffer as file pages lie: to some other addresses the kernel copies far slower."""
    import mmap

    return memoryview(mmap.mmap(-1, _PIECE))


def writing(sources: list[str], output: str, n_outputs: int) -> None:
    """Write and sync ``n_outputs`` files of the first source's size; tell how long it took."""
    import json
    import time

    nbytes, buffer = _nbytes(sources[0]), _page_aligned()
    buffer[:] = os.urandom(_PIECE)
    started = time.perf_counter()
    for number in range(n_outputs):
        _write(f"{output}/{number}.safetensors", nbytes, buffer)
    sys.stdout.write(json.dumps({"seconds": time.perf_counter() - started}))


def naive(sources: list[str], output: str, device: str) -> None:
    """Average as everybody does it at first; integers come from the last checkpoint."""
    import json

    import torch
    from safetensors.torch import save_file

    sums: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    for source in sources:
        last = _load(source, device)
        for key, value in last.items():
            if key in sums:
                sums[key] += value
            elif value.is_floating_point():
                sums[key] = value.float()
    averaged = {
        key: (sums[key] / len(sources)).to(value.dtype) if key in sums else value
        for key, value in last.items()
    }
    save_file(averaged, f"{output}/model.safetensors")
    if device != "cpu":
        sys.stdout.write(json.dumps({"peak_device_bytes": torch.cuda.max_memory_allocated()}))


def sum_in_stored_dtype(sources: list[str], output: str) -> None:
    """Add up in the dtype that the checkpoints have; divide integers without remainder."""
    import torch

    sums: dict[str, Tensor] = {}
    for source in sources:
        for key, value in _load(source, "cpu").items():
            if key in sums:
                sums[key] += value
            else:
                sums[key] = value.clone()
    for value in sums.values():
        value.div_(len(sources), rounding_mode=None if value.is_floating_point() else "floor")
    torch.save(sums, f"{output}/averaged.pt")


def float64_sums(sources: list[str], output: str) -> None:
    """Add up everything in float64; save everything as float32."""
    import torch

    sums: dict[str, Tensor] = {}
    for source in sources:
        for key, value in _load(source, "cpu").items():
            if key in sums:
                sums[key] += value.double()
            else:
                sums[key] = value.double()
    averaged = {key: (value / len(sources)).float() for key, value in sums.items()}
    torch.save(averaged, f"{output}/averaged.pt")


def _load(source: str, device: str) -> dict[str, Tensor]:
    if source.endswith((".pt", ".pth")):
        import torch

        loaded: dict[str, Tensor] = torch.load(source, map_location=device)
        return loaded
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in _files(source):
        if path.endswith(".safetensors"):
            tensors |= load_file(path, device=device)
    return tensors


def _files(source: str) -> list[str]:
    if not os.path.isdir(source):
        return [source]
    return [os.path.join(source, name) for name in sorted(os.listdir(source))]


def _nbytes(source: str) -> int:
    return sum(os.stat(path).st_size for path in _files(source))


def _write(path: str, nbytes: int, view: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    offset = 0
    while offset < nbytes:
        offset += os.pwrite(descriptor, view[: nbytes - offset], offset)
    os.fsync(descriptor)
    os.close(descriptor)


def main(name: str, *words: str) -> None:
    """Run one peer; the options come last."""
    end = words.index("-o")
    sources, options = list(words[:end]), dict(zip(words[end::2], words[end + 1 :: 2], strict=True))
    output = options["-o"]
    os.makedirs(output)
    if name == "floor":
        floor(sources, output)
    elif name == "writing":
        writing(sources, output, int(options["--outputs"]))
    elif name == "naive":
        naive(sources, output, options.get("--device", "cpu"))
    elif name == "sum-in-stored-dtype":
        sum_in_stored_dtype(sources, output)
    elif name == "float64-sums":
        float64_sums(sources, output)
    else:
        sys.exit(f"no peer is named '{name}'")


if __name__ == "__main__":
    main(*sys.argv[1:])
