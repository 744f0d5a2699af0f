"""Serve directories of this machine as the revisions of one repository, until stdin ends.

Run in tests/: python -m loopback_hub org/name step1=DIR step2=DIR; prints the address.
"""

import sys
import tempfile
from pathlib import Path

from . import LoopbackHub


def main(repo: str, *revisions: str) -> None:
    """Serve ``name=directory`` pairs."""
    with (
        tempfile.TemporaryDirectory(prefix="loopback-hub-") as root,
        LoopbackHub(Path(root)) as hub,
    ):
        hub.create(repo)
        for revision in revisions:
            name, _, directory = revision.partition("=")
            files = {path.name: path for path in Path(directory).iterdir() if path.is_file()}
            hub.commit(repo, name, files)
        sys.stdout.write(f"{hub.url}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
