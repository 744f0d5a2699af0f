"""``python -m ckptavg`` and the console script: the command line, from the first moment on."""

import sys


def main() -> None:
    """Load the command line and run it; an interrupt while it loads is one line, too."""
    try:
        from ckptavg.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("ckptavg: error: interrupted; nothing was published\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
