"""Hashes of what goes in: recorded as the files are, and compared with what the files say."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import tomllib
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import verify_fixtures
from conftest import FORMATS, save_checkpoint, tree
from dcp_files import nested_dcp
from hostile import Member, mapping, pickled, tensor, torch_members, zip_bytes
from hub_fixtures import REPO, ckptavg
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from memory_probe import WATCH
from safetensors.torch import save_file
from test_processes import torchrun
from test_resume import interrupted

from ckptavg import (
    BnPass,
    CheckpointError,
    IncompatibleCheckpointsError,
    average_checkpoints,
    recompute_bn,
    verify_output,
)
from ckptavg.checkpoint.digests import FileDigest
from ckptavg.checkpoint.files import PositionalFile

MB = 10**6
ADAPTER_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def weights(step: int, numel: int = 9) -> dict[str, torch.Tensor]:
    """Return tensors that are nowhere else, byte for byte."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(numel, generator=generator) for name in ("a", "b", "c")}


def training(step: int) -> dict[str, Any]:
    """Return weights beside an optimizer that is many times larger."""
    moments = {"exp_avg": torch.randn(5000, generator=torch.Generator().manual_seed(step + 100))}
    return {"model": weights(step), "optimizer": {"state": {0: moments}}}


# ---- layouts


def single_directory(step: int) -> Path:
    directory = Path(f"step-{step}")
    directory.mkdir()
    save_file(weights(step), directory / "model.safetensors")
    return directory


def torch_file(step: int, **options: Any) -> Path:
    torch.save(training(step), f"step-{step}.pt", **options)
    return Path(f"step-{step}.pt")


def npz_file(step: int) -> Path:
    arrays: Mapping[str, Any] = {name: value.numpy() for name, value in weights(step).items()}
    np.savez(f"step-{step}.npz", **arrays)
    return Path(f"step-{step}.npz")


def adapter_directory(step: int) -> Path:
    directory = Path(f"step-{step}")
    directory.mkdir()
    generator = torch.Generator().manual_seed(step)
    factors = {"A": torch.randn(2, 6, generator=generator), "B": torch.randn(5, 2)}
    named = {f"base_model.model.q.lora_{name}.weight": one for name, one in factors.items()}
    save_file(named, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG))
    return directory


def dcp_safetensors_directory(step: int) -> Path:
    directory = Path(f"step-{step}")
    directory.mkdir()
    for rank in (0, 1):
        parts = {name: value[5 * rank : 5 * rank + 5] for name, value in weights(step, 10).items()}
        told = {name: {"saved_offsets": [5 * rank]} for name in parts}
        name = f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
        save_file(parts, directory / name, {"DCP_SHARDING_INFO": json.dumps(told)})
    return directory


LAYOUTS: Mapping[str, Callable[[int], Path]] = {
    "safetensors file": lambda step: saved(step, "safetensors"),
    "safetensors directory": single_directory,
    "sharded safetensors directory": lambda step: saved(step, "sharded safetensors"),
    "torch file": torch_file,
    "legacy torch file": lambda step: torch_file(step, _use_new_zipfile_serialization=False),
    "sharded torch directory": lambda step: saved(step, "sharded torch"),
    "npz file": npz_file,
    "DCP directory": lambda step: nested_dcp(Path(f"step-{step}"), training(step)),
    "DCP directory of other names": lambda step: nested_dcp(
        Path(f"step-{step}"), training(step), names=("first.bin", "second.bin")
    ),
    "DCP safetensors directory": dcp_safetensors_directory,
    "PEFT adapter directory": adapter_directory,
}


def saved(step: int, layout: str) -> Path:
    return save_checkpoint(Path(f"step-{step}"), weights(step), layout)


def files_of(source: Path) -> list[Path]:
    return [path for path in sorted(source.rglob("*")) if path.is_file()] or [source]


def hashes(*sources: Path) -> dict[str, str]:
    """Return the hash of every file of these checkpoints."""
    return {
        str(path): f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        for source in sources
        for path in files_of(source)
    }


def recorded(output: str | Path) -> dict[str, str | None]:
    """Return the hash of every file that an output says it was made from."""
    told = json.loads(Path(output, "ckptavg.json").read_text())
    files = [file for one in told["checkpoints"] for file in one["files"]]
    found = {file["path"]: file["digest"] for file in files}
    assert len(found) == len(files)
    return found


def flip(path: Path, position: int = -1) -> None:
    """Change a byte, and hide it from those who look at size and time."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip_in(path: Path, value: torch.Tensor) -> None:
    """Change a byte in the middle of a tensor's data."""
    data = value.numpy().tobytes()
    assert path.read_bytes().count(data) == 1
    flip(path, path.read_bytes().index(data) + len(data) // 2)


def left_over() -> list[str]:
    """Return what an unpublished output left here."""
    return [path.name for path in Path().glob("*out*")]


# ---- what is recorded


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_hash_of_every_file_is_recorded_and_verified(here: Path, layout: str) -> None:
    sources = [LAYOUTS[layout](step) for step in (1, 2)]
    average_checkpoints(sources, "out", checksum=True)
    assert recorded("out") == hashes(*sources)
    assert verify_output("out").ok
    for path in files_of(sources[1]):
        flip(path)
        assert verify_output("out").problems == (
            f"the source {sources[1]} has other content in the {path.stat().st_size} bytes of "
            f"{path.name}",
        )
        flip(path)
    assert verify_output("out").ok


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_hashed_that_nobody_asked_for(
    here: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [LAYOUTS[layout](step) for step in (1, 2)]

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(FileDigest, "advance", refuse)
    average_checkpoints(sources, "out")
    assert recorded("out") == dict.fromkeys(hashes(*sources))


def test_a_copy_of_another_time_is_unchanged_where_hashes_tell(here: Path) -> None:
    sources = [saved(step, "sharded safetensors") for step in (1, 2)]
    average_checkpoints(sources, "out", checksum=True)
    for path in files_of(sources[0]):
        os.utime(path, ns=(1, 1))
    assert verify_output("out").ok


@pytest.mark.parametrize(
    "options",
    [
        {"n_threads": 1},
        {"n_threads": 5},
        {"dtype": "bfloat16"},
        {"output_format": "torch"},
        {"check_trajectory": True},
        {"schemes": "median"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_no_option_leaves_a_file_out(here: Path, options: dict[str, Any]) -> None:
    sources = [saved(step, FORMATS[step]) for step in range(4)]
    average_checkpoints(sources, "out", checksum=True, **options)
    assert recorded("out") == hashes(*sources)


def test_the_order_of_sources_does_not_matter(here: Path) -> None:
    sources = [LAYOUTS["torch file"](step) for step in (3, 1, 2)]
    Path("step-4.pt").symlink_to("step-1.pt")
    for given in (sources, sources[::-1], [*sources, Path("step-4.pt")]):
        average_checkpoints(given, "out", checksum=True, overwrite=True)
        assert recorded("out") == hashes(*given)


def test_every_output_tells_of_its_own_checkpoints(here: Path) -> None:
    sources = [saved(step, "sharded safetensors") for step in (1, 2, 3)]
    schemes = ["all=uniform", "last=uniform:last=1", "two=uniform:last=2"]
    average_checkpoints(sources, "out", schemes=schemes, checksum=True)
    for name, count in (("all", 3), ("last", 1), ("two", 2)):
        assert recorded(f"out/{name}") == hashes(*sources[-count:])
        assert verify_output(f"out/{name}").ok


def test_what_does_not_go_in_is_not_hashed(here: Path) -> None:
    sources = [LAYOUTS["torch file"](step) for step in (1, 2, 3)]
    flip_in(sources[0], weights(1)["a"])
    average_checkpoints(sources, "out", schemes="uniform:last=2", checksum=True)
    assert recorded("out") == hashes(*sources[1:])


def test_another_batchnorm_pass_records_its_input(here: Path) -> None:
    save_file(verify_fixtures.states(1)[0], "step-1.safetensors")
    bn_pass = BnPass(model=verify_fixtures.Net, batches=verify_fixtures.batches)
    recompute_bn("step-1.safetensors", "out", bn_pass, checksum=True)
    assert recorded("out") == hashes(Path("step-1.safetensors"))
    flip(Path("step-1.safetensors"))
    assert not verify_output("out").ok


def test_adapters_are_hashed_however_long_their_average_takes(here: Path) -> None:
    sources = [adapter_directory(step) for step in (1, 2, 3)]

    def wait(stage: str, done: int, total: int | None) -> None:
        time.sleep(0.1)  # as large factors do

    average_checkpoints(sources, "out", checksum=True, progress=wait)
    assert recorded("out") == hashes(*sources)


# ---- interrupted runs, several processes


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("first", [True, False], ids=["with hashes", "without"])
def test_a_continued_run_hashes_all_of_every_file(here: Path, first: bool) -> None:
    sources = [save_checkpoint(Path(f"s-{n}"), weights(n, 3000), "torch") for n in (1, 2)]
    interrupted(sources, Path("out"), checksum=first)
    result = average_checkpoints(sources, "out", checksum=True)
    assert 0 < result.resumed_nbytes < result.read_nbytes
    assert recorded("out") == hashes(*sources)


@pytest.mark.usefixtures("small_blocks")
def test_a_run_that_had_averaged_everything_hashes_all_of_every_file(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [torch_file(step) for step in (1, 2)]

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ckptavg.steps.provenance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            average_checkpoints(sources, "out", checksum=True)
    result = average_checkpoints(sources, "out", checksum=True)
    assert result.resumed_nbytes == result.read_nbytes
    assert recorded("out") == hashes(*sources)


PROCESS = """
import json, os, sys
from ckptavg import CkptavgError, average_checkpoints, blocks
from ckptavg.checkpoint.digests import FileDigest
blocks.BLOCK_NBYTES = 4000
finish, hashed, told = FileDigest.finish, [], []
def noted(digest):
    hashed.append(digest.file.path)
    return finish(digest)
FileDigest.finish = noted
def attempt(name, sources):
    try:
        average_checkpoints(sources, name, checksum=True, distributed=True)
    except CkptavgError as error:
        told.append(f"{type(error).__name__}: {error}")
    return [*hashed]
first = attempt("out", sys.argv[1:-1])
attempt("damaged-out", [sys.argv[1], sys.argv[-1]])
with open(f"told-{os.environ['RANK']}.json", "w") as file:
    json.dump([first, told], file)
"""


def test_processes_share_the_files_and_fail_together(here: Path) -> None:
    sources = [
        save_checkpoint(Path(f"step-{step}"), weights(step, 3000), FORMATS[step])
        for step in range(3)
    ]
    damaged = torch_file(4)
    torch.save(weights(4, 3000), damaged)
    flip_in(damaged, weights(4, 3000)["b"])
    Path("script.py").write_text(PROCESS)
    ended = torchrun("script.py", *map(str, sources), str(damaged), cwd=here)
    assert ended.returncode == 0, ended.stderr
    told = [json.loads(Path(f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert recorded("out") == hashes(*sources)
    assert all(files for files, _ in told)
    assert sorted(told[0][0] + told[1][0]) == sorted(hashes(*sources))
    failures = [failure for _, failures in told for failure in failures]
    assert len(failures) == 2
    assert all("step-4.pt: its" in one and "(CRC-32 differs)" in one for one in failures)
    assert left_over() == ["out"]


# ---- zip members that are not what their CRC-32 says


@pytest.mark.parametrize("kind", ["weights", "optimizer"])
def test_a_torch_file_with_changed_data_is_refused(
    here: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [torch_file(step) for step in (1, 2)]
    stored = training(2)
    value = stored["model"]["b"] if kind == "weights" else stored["optimizer"]["state"][0]
    flip_in(sources[1], value["exp_avg"] if kind == "optimizer" else value)
    before = tree(here)
    code, out, err = ckptavg(capsys, "average", *sources, "-o", "out", "--checksum")
    assert (code, out) == (1, "")
    assert re.fullmatch(
        r"ckptavg: error: step-2\.pt: its [\w/-]+/data/\d+ is damaged \(CRC-32 differs\)\n", err
    )
    assert tree(here) == before
    assert left_over() == []
    assert ckptavg(capsys, "average", *sources, "-o", "out")[0] == 0


@pytest.mark.parametrize(
    ("layout", "name"),
    [("sharded torch directory", "step-2/pytorch_model-00002-of-00003.bin"),
     ("npz file", "step-2.npz")],
)  # fmt: skip
def test_other_zip_files_with_changed_data_are_refused(here: Path, layout: str, name: str) -> None:
    sources = [LAYOUTS[layout](step) for step in (1, 2)]
    flip_in(Path(name), weights(2)["b"])
    with pytest.raises(CheckpointError, match=rf"^{name}: its \S+ is damaged \(CRC-32 differs\)$"):
        average_checkpoints(sources, "out", checksum=True)
    assert left_over() == []


def test_another_batchnorm_pass_refuses_changed_data(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = verify_fixtures.states(1)[0]
    torch.save(state, "step-1.pt")
    flip_in(Path("step-1.pt"), state["linear.weight"])
    code, _, err = ckptavg(
        capsys, "recompute-bn", "step-1.pt", "-o", "out", "--checksum",
        "--model", "verify_fixtures:Net", "--data", "verify_fixtures:batches",
    )  # fmt: skip
    assert code == 1
    assert err.endswith("(CRC-32 differs)\n")
    assert left_over() == []


@pytest.mark.parametrize("position", ["first", "last"])
def test_the_edges_of_a_member_are_covered(here: Path, position: str) -> None:
    sources = [torch_file(step) for step in (1, 2)]
    content = sources[1].read_bytes()
    data = weights(2)["c"].numpy().tobytes()
    flip(sources[1], content.index(data) + (0 if position == "first" else len(data) - 1))
    with pytest.raises(CheckpointError, match=r"step-2\.pt: .* \(CRC-32 differs\)"):
        average_checkpoints(sources, "out", checksum=True)


def torch_bytes(crc: int | None, data: bytes = b"\0" * 16) -> bytes:
    members = torch_members(pickled(mapping({"w": tensor()})), {"0": data})
    return zip_bytes(
        [
            Member(name=one.name, content=one.content, crc=crc if "/data/" in str(one.name) else 0)
            for one in members
        ]
    )


@pytest.mark.parametrize(("crc", "is_refused"), [(None, False), (0, False), (1, True)])
def test_a_checksum_of_zero_was_not_computed(here: Path, crc: int | None, is_refused: bool) -> None:
    Path("w.pt").write_bytes(torch_bytes(crc))
    if is_refused:
        with pytest.raises(CheckpointError, match=r"w\.pt: its archive/data/0 .*CRC-32 differs"):
            average_checkpoints(["w.pt"], "out", checksum=True)
    else:
        average_checkpoints(["w.pt"], "out", checksum=True)
        assert recorded("out") == hashes(Path("w.pt"))


def test_files_that_torch_saves_without_checksums_pass(here: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        sources = [torch_file(step) for step in (1, 2)]
    finally:
        torch.serialization.set_crc32_options(True)
    average_checkpoints(sources, "out", checksum=True)
    assert recorded("out") == hashes(*sources)


# ---- inputs that change


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


CHANGES: Mapping[str, Callable[[Path], object]] = {
    "other bytes of the optimizer": lambda path: path.write_bytes(
        path.read_bytes().replace(b"\0" * 64, b"\1" * 64)
    ),
    "more bytes": grow,
    "fewer bytes": lambda path: os.truncate(path, path.stat().st_size // 2),
    "no bytes": lambda path: os.truncate(path, 0),
    "another time": lambda path: os.utime(path),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_while_it_is_hashed_is_refused(
    here: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [Path(f"step-{step}.pt") for step in (1, 2)]
    for step, path in enumerate(sources):  # of the old format, without checksums
        content = {"model": weights(step), "optimizer": {"exp_avg": torch.zeros(1000)}}
        torch.save(content, path, _use_new_zipfile_serialization=False)
        os.utime(path, ns=(1, 1))
    finish = FileDigest.finish

    def changed(digest: FileDigest) -> str:
        if digest.file.path == "step-2.pt":
            CHANGES[change](Path("step-2.pt"))
        return finish(digest)

    monkeypatch.setattr(FileDigest, "finish", changed)
    with pytest.raises(CheckpointError, match=r"^step-2\.pt: .*changed while being read"):
        average_checkpoints(sources, "out", checksum=True)
    assert left_over() == []


def test_an_input_that_changes_while_it_is_averaged_is_refused(here: Path) -> None:
    sources = [torch_file(step) for step in (1, 2)]
    for path in sources:
        os.utime(path, ns=(1, 1))

    def change(stage: str, done: int, total: int | None) -> None:
        os.utime(sources[0])

    with pytest.raises(CheckpointError, match=r"^step-1\.pt: changed while being read"):
        average_checkpoints(sources, "out", checksum=True, progress=change)
    assert left_over() == []


def test_hashing_ends_where_averaging_fails(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for what is left of large files."""
    state = {"w": torch.tensor([float("nan")])}
    torch.save({"model": state, "optimizer": torch.zeros(2**20)}, "step-3.pt")
    torch.save({"model": {"w": torch.ones(1)}}, "step-4.pt")
    advance, read = FileDigest.advance, []

    def slow(digest: FileDigest, stop: int, *arguments: Any, **options: Any) -> None:
        read.append(digest.position)
        time.sleep(0.01)
        advance(digest, min(stop, digest.position + 2**12), *arguments, **options)

    monkeypatch.setattr(FileDigest, "advance", slow)
    with pytest.raises(IncompatibleCheckpointsError, match="finite"):
        average_checkpoints(["step-3.pt", "step-4.pt"], "out", checksum=True)
    assert len(read) < 100  # all of it takes a thousand
    assert left_over() == []


# ---- how files are read


def advance_to_the_end(digest: FileDigest, step: int, buffer: memoryview) -> None:
    for stop in range(0, digest.file.size + step, step):
        digest.advance(stop, buffer)
        assert digest.position == min(stop, digest.file.size)


@pytest.mark.parametrize("room", [1, 7, 4096])
@pytest.mark.parametrize("step", [1, 13, 10**6])
def test_a_digest_does_not_depend_on_how_the_file_is_read(here: Path, room: int, step: int) -> None:
    Path("w.pt").write_bytes(torch_bytes(None, bytes(range(16))))
    (expected,) = hashes(Path("w.pt")).values()
    buffer = memoryview(bytearray(room))
    file = PositionalFile("w.pt", "w.pt")
    digest = FileDigest(file)
    advance_to_the_end(digest, step, buffer)
    assert digest.finish() == expected
    file.close()
    data = Path("w.pt").read_bytes().index(bytes(range(16)))
    for position in (data, data + 7, data + 15):
        flip(Path("w.pt"), position)
        file = PositionalFile("w.pt", "w.pt")
        digest = FileDigest(file)
        with pytest.raises(CheckpointError, match=r"w\.pt: its archive/data/0 .*CRC-32 differs"):
            advance_to_the_end(digest, step, buffer)
        file.close()
        flip(Path("w.pt"), position)


def test_a_file_is_hashed_in_pieces(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("large").open("wb") as large:
        large.truncate(64 * 2**20)
    read_into, pieces = PositionalFile.read_into, []

    def noted(file: PositionalFile, offset: int, buffers: Sequence[memoryview]) -> None:
        pieces.append(sum(buffer.nbytes for buffer in buffers))
        read_into(file, offset, buffers)

    monkeypatch.setattr(PositionalFile, "read_into", noted)
    file = PositionalFile("large", "large")
    tracemalloc.start()
    try:
        digest = FileDigest(file).finish()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        file.close()
    assert {"large": digest} == hashes(Path("large"))
    assert max(pieces) <= 2**20
    assert sum(pieces) < 65 * 2**20
    assert peak < 3 * 2**20


PROBE = (
    WATCH
    + """
import sys, numpy
memory = here()
from ckptavg import average_checkpoints
with watched(memory):
    average_checkpoints(sys.argv[1:], "out", checksum=True, n_threads=8, memory_budget_bytes=BUDGET)
assert "torch" not in sys.modules
print(memory.largest - memory.baseline)
"""
)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("budget_mb", [24, 64])
def test_memory_stays_within_the_budget(here: Path, budget_mb: int) -> None:
    sources = [f"step-{step}.pt" for step in range(8)]
    for path in sources[:1]:
        torch.save({"model": {"w": torch.ones(5 * MB)}, "optimizer": torch.ones(20 * MB)}, path)
    for path in sources[1:]:
        os.link(sources[0], path)
    ended = subprocess.run(
        [sys.executable, "-c", PROBE.replace("BUDGET", f"{budget_mb * MB}"), *sources],
        capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert int(ended.stdout) <= budget_mb * MB


@pytest.mark.parametrize("kind", ["sha256", "git-sha1"])
def test_a_file_is_compared_with_what_its_source_tells(here: Path, kind: str) -> None:
    content = bytes(range(256)) * 9
    Path("copy").write_bytes(content)
    told = {
        "sha256": hashlib.sha256(content),
        "git-sha1": hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False),
    }[kind].hexdigest()

    def verify() -> None:
        file = PositionalFile("copy", "org/model@main/copy", f"{kind}:{told}")
        try:
            file.verify()
        finally:
            file.close()

    verify()
    for position in (0, 1000, -1):
        flip(Path("copy"), position)
        with pytest.raises(CheckpointError, match=rf"^org/model@main/copy: .*expected {kind}:"):
            verify()
        flip(Path("copy"), position)
    grow(Path("copy"))
    with pytest.raises(CheckpointError, match=r"its copy in the cache is damaged; remove"):
        verify()


# ---- the option


@pytest.mark.parametrize("command", ["average", "recompute-bn"])
def test_the_option_is_in_the_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ckptavg(capsys, command, "--help")
    assert code == 0
    assert re.search(r"^ +--checksum +\S.*SHA-256", out, re.MULTILINE | re.DOTALL)


def test_a_dry_run_reads_headers_only(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [torch_file(step) for step in (1, 2)]
    before = tree(here)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(FileDigest, "advance", refuse)
    code, out, _ = ckptavg(capsys, "average", *sources, "-o", "out", "--checksum", "--dry-run")
    assert code == 0
    assert out.startswith("would average 2 checkpoints")
    assert tree(here) == before


def test_a_recipe_may_ask_for_hashes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [torch_file(step) for step in (1, 2)]
    text = 'sources = "step-*.pt"\n[machine]\nchecksum = {}\n[output]\noutput = "out"\n'
    Path("swa.toml").write_text(text.format("true"))
    assert ckptavg(capsys, "run", "swa.toml")[0] == 0
    assert recorded("out") == hashes(*sources)
    Path("swa.toml").write_text(text.format("false"))
    assert ckptavg(capsys, "run", "swa.toml", "--overwrite")[0] == 0
    assert set(recorded("out").values()) == {None}


@pytest.mark.parametrize("command", ["average", "recompute-bn"])
def test_a_saved_recipe_asks_for_hashes_again(
    here: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(verify_fixtures.states(1)[0], "step-1.safetensors")
    code, _, _ = ckptavg(
        capsys, command, "step-1.safetensors", "-o", "out", "--checksum",
        "--model", "verify_fixtures:Net", "--data", "verify_fixtures:batches",
        "--save-recipe", "swa.toml",
    )  # fmt: skip
    assert code == 0
    assert tomllib.loads(Path("swa.toml").read_text())["machine"] == {"checksum": True}
    assert ckptavg(capsys, "run", "swa.toml", "-o", "again")[0] == 0
    assert recorded("out") == recorded("again") == hashes(Path("step-1.safetensors"))


def test_hashes_change_no_bit_of_the_output(here: Path) -> None:
    sources = [saved(step, FORMATS[step]) for step in range(4)]
    average_checkpoints(sources, "plain")
    average_checkpoints(sources, "out", checksum=True)
    assert Path("plain/model.safetensors").read_bytes() == (
        Path("out/model.safetensors").read_bytes()
    )
    assert verify_output("out", reproduce=True).ok


# ---- what comes from the Hub

SOURCES = f"{REPO}@step*"
SHARD, INDEX = "model-00001-of-00003.safetensors", "model.safetensors.index.json"
MODES: Mapping[str, Sequence[str]] = {"streamed": (), "kept": ("--cache",), "offline": ()}


class Cache:
    """What the cache of huggingface_hub holds of the last revision."""

    def __init__(self, hub: LoopbackHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = home / "hub" / "models--org--model"
        self._commit = hub.branches(REPO)["step10"]
        self._monkeypatch = monkeypatch

    def copy_of(self, name: str) -> Path:
        return Path(os.path.realpath(self.folder / "snapshots" / self._commit / name))

    def enter(self, mode: str) -> None:
        self._monkeypatch.setattr(constants, "HF_HUB_OFFLINE", mode == "offline")


@pytest.fixture
def cache(
    hub: LoopbackHub, steps: list[Path], here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Cache:
    """The cache after a run that filled it."""
    average_checkpoints(SOURCES, "filling", cache=True)
    return Cache(hub, tmp_path / "home", monkeypatch)


def hub_hashes(local: Sequence[Path]) -> list[str]:
    """Return the hashes of the weights that are on the Hub, as of their copies here."""
    return sorted(
        digest for path, digest in hashes(*local).items() if path.endswith(".safetensors")
    )


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("keeps", [False, True], ids=["streamed", "kept"])
def test_hashes_of_the_hub_are_recorded_always(
    hub: LoopbackHub, steps: list[Path], here: Path, keeps: bool, checksum: bool
) -> None:
    average_checkpoints(SOURCES, "out", cache=keeps, checksum=checksum)
    assert sorted(map(str, recorded("out").values())) == hub_hashes(steps)
    assert verify_output("out").ok


@pytest.mark.parametrize("mode", MODES)
def test_hashes_of_copies_in_the_cache_are_recorded(
    cache: Cache, steps: list[Path], mode: str
) -> None:
    cache.enter(mode)
    average_checkpoints(SOURCES, "out", cache=mode == "kept")
    assert sorted(map(str, recorded("out").values())) == hub_hashes(steps)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [SHARD, INDEX, "config.json", "tokenizer.model"])
def test_a_damaged_copy_in_the_cache_is_refused(
    cache: Cache, name: str, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = cache.copy_of(name)
    call = ["average", SOURCES, "-o", "out", "--quiet", *MODES[mode]]
    cache.enter(mode)
    flip(copy)
    code, out, err = ckptavg(capsys, *call)
    assert (code, out) == (1, "")
    assert re.fullmatch(
        rf"ckptavg: error: {REPO}@step\d+/{name}: .*"
        rf"its copy in the cache is damaged; remove .*{cache.folder}.*\n",
        err,
    )
    assert left_over() == []
    flip(copy)
    assert ckptavg(capsys, *call)[0] == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("position", [0, 16])
def test_a_copy_that_makes_no_sense_is_told_to_be_one(
    cache: Cache, position: int, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who is told that the file is damaged believes that the one on the Hub is."""
    flip(cache.copy_of(SHARD), position)
    cache.enter(mode)
    code, _, err = ckptavg(capsys, "average", SOURCES, "-o", "out", "--quiet", *MODES[mode])
    assert code == 1
    assert f"{REPO}@step10" in err
    assert re.search(rf"cache.*remove .*{cache.folder}", err)
    assert left_over() == []


@pytest.mark.parametrize("mode", ["streamed", "kept"])
def test_a_copy_of_another_size_is_told_to_be_one(
    cache: Cache, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.truncate(cache.copy_of(SHARD), 1000)
    code, _, err = ckptavg(capsys, "average", SOURCES, "-o", "out", "--quiet", *MODES[mode])
    assert code == 1
    assert re.search(rf"{REPO}@step10/{SHARD}: .*cache.*remove .*{cache.folder}", err)
    assert left_over() == []


@pytest.mark.parametrize("mode", ["streamed", "kept"])
def test_after_what_is_named_was_removed_all_is_well(
    cache: Cache, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["average", SOURCES, "-o", "out", "--quiet", *MODES[mode]]
    flip(cache.copy_of(SHARD))
    _, _, err = ckptavg(capsys, *call)
    named = re.findall(rf"{re.escape(str(cache.folder))}[^\s();,]+", err)
    assert named
    for path in named:
        Path(path).unlink()
    code, _, err = ckptavg(capsys, *call)
    assert (code, err) == (0, "")
