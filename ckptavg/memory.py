"""Peak memory of this process, as the operating system and torch count it."""

import sys


def peak_host_bytes() -> int | None:
    """Return the largest resident set so far in bytes, or None where the system does not tell."""
    try:
        import resource
    except ImportError:  # pragma: no cover - not on Linux or macOS
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: str) -> int | None:
    """Return the most memory that torch had allocated on a CUDA device; None for the CPU."""
    if device == "cpu":
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(device))
