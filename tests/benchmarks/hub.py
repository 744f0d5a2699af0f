"""Reading from a Hub on loopback: ckptavg, and a plain client that reads the same ranges."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from .inputs import InputSet
from .measure import ROOT, Contender

REPO = "org/model"
_RANGE_BYTES = 8 * 2**20
_TIMEOUT_SECONDS = 60


@contextmanager
def served(inputs: InputSet) -> Iterator[str]:
    """Serve each checkpoint as a revision ``step-N``; yield the address of the Hub."""
    revisions = [f"step-{number}={path}" for number, path in enumerate(inputs.paths, start=1)]
    server = subprocess.Popen(
        [sys.executable, "-m", "loopback_hub", REPO, *revisions],
        cwd=ROOT / "tests",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        yield server.stdout.readline().strip()
    finally:
        server.stdin.close()
        server.wait()


def hub_contenders(inputs: InputSet, outputs: Path, address: str) -> list[Contender]:
    """Return ckptavg, and the plain client over one and over eight connections."""
    environment = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(outputs / "hf-home"),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_test",
    }
    own = outputs / "ckptavg"
    options = ["-o", str(own), "--overwrite", "--json", "--device", "cpu"]
    count = str(len(inputs.paths))
    return [
        Contender(
            name="ckptavg",
            commands=((sys.executable, "-m", "ckptavg", "average", f"{REPO}@step-*", *options),),
            output=own,
            due_nbytes=inputs.checkpoint_nbytes,
            environment=environment,
        ),
        *(
            Contender(
                name=f"plain client, {connections}",
                commands=(
                    (sys.executable, "-m", "tests.benchmarks.hub", count, str(connections), output),
                ),
                output=Path(output),
                due_nbytes=0,
                environment=environment,
            )
            for connections in (1, 8)
            for output in [str(outputs / f"plain-{connections}")]
        ),
    ]


def read_plainly(n_revisions: int, connections: int) -> tuple[int, float]:
    """Read every weight file by ranges and keep nothing; return bytes and seconds."""
    from huggingface_hub import HfApi, get_hf_file_metadata, get_session, hf_hub_url

    ranges = []
    for number in range(1, n_revisions + 1):
        revision = f"step-{number}"
        for name in HfApi().list_repo_files(REPO, revision=revision):
            if name.endswith((".safetensors", ".bin")):
                told = get_hf_file_metadata(hf_hub_url(REPO, name, revision=revision))
                size = told.size or 0
                ranges += [
                    (told.location, first, min(first + _RANGE_BYTES, size))
                    for first in range(0, size, _RANGE_BYTES)
                ]

    def read(wanted: tuple[str, int, int]) -> int:
        address, first, end = wanted
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={first}-{end - 1}"}
        buffer, filled = bytearray(end - first), 0
        with get_session().stream(
            "GET", address, headers=headers, timeout=_TIMEOUT_SECONDS
        ) as response:
            for part in response.iter_raw():
                buffer[filled : filled + len(part)] = part
                filled += len(part)
        return filled

    started = time.perf_counter()
    with ThreadPoolExecutor(connections) as pool:
        n_bytes = sum(pool.map(read, ranges))
    return n_bytes, time.perf_counter() - started


if __name__ == "__main__":
    Path(sys.argv[3]).mkdir(parents=True)
    read_nbytes, seconds = read_plainly(int(sys.argv[1]), int(sys.argv[2]))
    json.dump({"read_nbytes": read_nbytes, "average_seconds": seconds}, sys.stdout)
