"""What ckptavg writes about models beside them: names, and what tells them from other files."""

import os
import re
import stat
from pathlib import Path

# of searches, in a model directory; of measurements, in a directory of their own
SEARCH_FILE = re.compile(r"(sweep|soup|tune)\.(json|csv|png)")
MEASURED_FILE = re.compile(r"(trajectory|plane|width|path|ensemble)\.(json|csv|png|svg)")
REPORT_NAME = "report.html"
GENERATOR = '<meta name="generator" content="ckptavg '  # stands at the beginning of the file
_BEGINNING_BYTES = 1024


def is_report(path: Path) -> bool:
    """Tell whether a file is a page that ckptavg wrote; False where it cannot be read."""
    try:
        # a link may lead anywhere
        if path.suffix != ".html" or not stat.S_ISREG(path.lstat().st_mode):
            return False
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            beginning = os.read(descriptor, _BEGINNING_BYTES)
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return GENERATOR.encode() in beginning
