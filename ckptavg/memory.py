"""Peak memory of this process, as the operating system and torch count it."""

import re
from pathlib import Path


def peak_host_bytes() -> int | None:
    """Return the largest resident set so far in bytes, or None where the system does not tell."""
    # not getrusage: after fork and exec it still counts the parent's memory
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    match = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def peak_device_bytes(device: str) -> int | None:
    """Return the most memory that torch had allocated on a CUDA device; None for the CPU."""
    if device == "cpu":
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(device))
