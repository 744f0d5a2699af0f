"""``python -m ckptavg`` and the console script: the command line, from the first moment on."""

import os
import signal
from types import FrameType


def main() -> None:
    """Load the command line and run it; an interrupt while it loads is one line, too."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)  # an exception could come out of an import as another
    from ckptavg.cli import main as run

    run()


def _end(number: int, frame: FrameType | None) -> None:
    """End at once: nothing has begun."""
    os.write(2, b"ckptavg: error: ended by SIGINT; nothing was published\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
