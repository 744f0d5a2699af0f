"""``python -m ckptavg`` is the ``ckptavg`` command."""

from ckptavg.cli import main

if __name__ == "__main__":
    main()
