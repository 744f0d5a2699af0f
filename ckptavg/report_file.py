"""The page that ``report`` writes: its usual name, and what tells it from other pages."""

import os
import stat
from pathlib import Path

REPORT_NAME = "report.html"
GENERATOR = '<meta name="generator" content="ckptavg '  # stands at the beginning of the file
_BEGINNING_BYTES = 1024


def is_report(path: Path) -> bool:
    """Tell whether a file is a page that ckptavg wrote; False where it cannot be read."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # a link may lead anywhere
            return False
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            beginning = os.read(descriptor, _BEGINNING_BYTES)
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return GENERATOR.encode() in beginning
