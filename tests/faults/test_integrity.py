"""Verify finds whatever became of an output, or of what it was made from: any byte of any file."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint, tree
from hub_fixtures import ckptavg
from safetensors.torch import save_file

from ckptavg import (
    BnPass,
    EvalCommand,
    VerificationError,
    average_checkpoints,
    sweep,
    verify_output,
)
from ckptavg.checkpoint.folder import WEIGHT_SUFFIXES
from ckptavg.evidence_names import GENERATOR
from ckptavg.provenance import sealed
from faults.tally import CountCases

OUT = Path("out")
PROVENANCE = OUT / "ckptavg.json"
MAX_SHOWN = 20
MAX_CHANGED = 5000  # bytes of a file; of larger ones some are left out
MAX_CHANGED_IN_INPUTS = 500

pytestmark = pytest.mark.promise(15)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a directory with nothing else in it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"a": torch.tensor([1.5 * step, 2.25]), "b": torch.tensor([step])}


def sharded(step: int) -> Path:
    directory = save_checkpoint(Path(f"step-{step}"), weights(step), "sharded safetensors")
    (directory / "config.json").write_text('{"model_type": "net"}')
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/tool.jinja").write_text("{{ tools }}")
    return directory


def adapter(step: int) -> Path:
    directory = Path(f"step-{step}")
    directory.mkdir()
    factors = {"A": torch.full((1, 2), 0.5 * step), "B": torch.full((2, 1), 1.0 + step)}
    named = {f"base_model.model.q.lora_{name}.weight": one for name, one in factors.items()}
    save_file(named, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def sharded_output() -> None:
    """Make shards, side files and evidence of one checkpoint, so that little is told of it."""
    sweep(
        [sharded(1)],
        OUT,
        schemes=["uniform"],
        evaluation=BnPass(evaluate=EvalCommand("echo 1 # {model}")),
        mode="min",
        singles=False,
        max_shard_bytes=8,
    )
    assert {"model-00002-of-00002.safetensors", "sweep.json", "sweep.csv"} <= {*tree(OUT)}


def torch_output() -> None:
    average_checkpoints([sharded(1)], OUT, output_format="torch")
    assert "model.pt" in tree(OUT)


OUTPUTS: Mapping[str, Callable[[], None]] = {"shards": sharded_output, "torch": torch_output}


@pytest.fixture(params=OUTPUTS)
def files(request: pytest.FixtureRequest) -> Iterator[list[Path]]:
    """An output; its files, which a test leaves as they were."""
    name: str = request.param
    OUTPUTS[name]()
    assert verify_output(OUT).ok
    before = tree(OUT)
    yield [OUT / one for one in before]
    assert tree(OUT) == before
    assert verify_output(OUT).ok


def is_found() -> bool:
    """Tell whether verify says that something is wrong; any other error is one of the tool."""
    try:
        return not verify_output(OUT).ok
    except VerificationError as error:
        return "\n" not in str(error)


def positions(nbytes: int, most: int) -> range:
    return range(0, nbytes, -(-nbytes // most) or 1)


@contextmanager
def restored(path: Path) -> Iterator[None]:
    """Put a file back afterwards, with its time."""
    content, status = path.read_bytes(), path.stat()
    try:
        yield
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def passed_over(
    path: Path, change: Callable[[int], int], *, most: int = MAX_CHANGED, keeps_time: bool = False
) -> tuple[list[str], int]:
    """Change one byte after the other; return what was not found, and how many there were."""
    content, status = path.read_bytes(), path.stat()
    chosen = positions(len(content), most)
    failures = []
    with restored(path), path.open("r+b", buffering=0) as file:
        for position in chosen:
            byte = content[position]
            os.pwrite(file.fileno(), bytes([change(byte)]), position)
            if keeps_time:
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            try:
                if not is_found():
                    failures.append(f"{path}: byte {position}, {byte}, is {change(byte)}: passed")
            except Exception as error:
                failures.append(
                    f"{path}: byte {position}, {byte}, is {change(byte)}: "
                    f"{type(error).__name__}: {error}"
                )
            os.pwrite(file.fileno(), bytes([byte]), position)
    return failures, len(chosen)


def told(failures: list[str]) -> str:
    more = [f"and {len(failures) - MAX_SHOWN} more"] if len(failures) > MAX_SHOWN else []
    return "\n".join([*failures[:MAX_SHOWN], *more])


def check_command(capsys: pytest.CaptureFixture[str]) -> None:
    """See that the command fails in one line."""
    code, _, err = ckptavg(capsys, "verify", OUT)
    assert code == 1
    assert re.fullmatch(r"(note: [^\n]+\n)*ckptavg: error: out[:/][^\n]+\n", err)
    assert "unexpected" not in err


# ---- outputs


def test_every_changed_byte_of_an_output_is_found(
    files: list[Path], count_cases: CountCases
) -> None:
    failures, n_cases = [], 0
    for path in files:
        found, count = passed_over(path, lambda byte: byte ^ 0xFF)
        failures += found
        n_cases += count
    count_cases(n_cases)
    assert not failures, told(failures)


@pytest.mark.parametrize("bit", [0x01, 0x55])
def test_every_changed_character_of_the_provenance_is_found(
    files: list[Path], bit: int, count_cases: CountCases
) -> None:
    """Most of what comes out is JSON: digits become other digits, or the e of 1e9."""
    failures, n_cases = passed_over(PROVENANCE, lambda byte: byte ^ bit)
    count_cases(n_cases)
    assert not failures, told(failures)


def test_the_command_fails_wherever_a_byte_was_changed(
    files: list[Path], count_cases: CountCases, capsys: pytest.CaptureFixture[str]
) -> None:
    n_cases = 0
    for path in files:
        content = path.read_bytes()
        for position in (0, len(content) // 2, len(content) - 1):
            with restored(path):
                changed = bytearray(content)
                changed[position] ^= 0xFF
                path.write_bytes(changed)
                check_command(capsys)
            n_cases += 1
    count_cases(n_cases)


def test_every_truncation_of_an_output_is_found(files: list[Path], count_cases: CountCases) -> None:
    failures, n_cases = [], 0
    for path in files:
        content = path.read_bytes()
        with restored(path):
            for length in positions(len(content), 100):
                path.write_bytes(content[:length])
                n_cases += 1
                if not is_found():
                    failures.append(f"{path} cut to {length} bytes")
            path.write_bytes(content[:-1])
            assert is_found()
    count_cases(n_cases + len(files))
    assert not failures, told(failures)


@pytest.mark.parametrize("added", [b"\0", b"\n", b" ", b"{}", b"x" * 4096])
def test_added_bytes_are_found(
    files: list[Path], added: bytes, count_cases: CountCases, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in files:
        content = path.read_bytes()
        for changed in (content + added, added + content):
            with restored(path):
                path.write_bytes(changed)
                assert is_found(), path
                check_command(capsys)
    count_cases(2 * len(files))


def test_a_removed_file_is_found(
    files: list[Path], count_cases: CountCases, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in files:
        away = Path("away")
        path.rename(away)
        assert is_found(), path
        check_command(capsys)
        away.rename(path)
    count_cases(len(files))


def test_files_that_changed_places_are_found(files: list[Path], count_cases: CountCases) -> None:
    pairs = [(one, other) for one in files for other in files if one < other]
    for one, other in pairs:
        contents = one.read_bytes(), other.read_bytes()
        with restored(one), restored(other):
            one.write_bytes(contents[1])
            other.write_bytes(contents[0])
            assert is_found(), (one, other)
    count_cases(len(pairs))


@contextmanager
def added(path: Path, value: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Add a file of weights, and remove it afterwards."""
    is_deeper = not path.parent.is_dir()
    if is_deeper:
        path.parent.mkdir()
    save_file(dict(value), path)
    try:
        yield
    finally:
        path.unlink()
        if is_deeper:
            path.parent.rmdir()


@pytest.mark.parametrize(
    "name",
    [
        "model-00003-of-00003.safetensors", "adapter_model.safetensors", "deeper/w.safetensors",
        *(f"added{suffix}" for suffix in WEIGHT_SUFFIXES),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("files")
def test_added_weights_are_found(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with added(OUT / name, weights(3)):
        assert is_found()
        check_command(capsys)


@pytest.mark.usefixtures("files")
def test_added_weights_that_look_like_a_report_are_found() -> None:
    """A page is known by what stands in it, which may stand in any file."""
    text = torch.frombuffer(bytearray(GENERATOR.encode()), dtype=torch.uint8)
    with added(OUT / "added.safetensors", {"a": text}):
        assert is_found()


SIZES = ("1e999", "-1e999", "1e400512", "-1", "1.5", "null", "true", "[]", "{}", '""', "9" * 5000)


@pytest.mark.parametrize("is_sealed", [False, True], ids=["as it was", "sealed again"])
@pytest.mark.usefixtures("files")
def test_a_size_that_is_none_is_no_surprise(is_sealed: bool, count_cases: CountCases) -> None:
    """One changed byte makes 1e400512 of 13400512, which is more than a float can be."""
    text = PROVENANCE.read_text()
    places = [match.span(1) for match in re.finditer(r'"nbytes": (\d+)', text)]
    failures = []
    with restored(PROVENANCE):
        for start, stop in places:
            for value in SIZES:
                changed = f"{text[:start]}{value}{text[stop:]}".encode()
                PROVENANCE.write_bytes(sealed(changed) if is_sealed else changed)
                what = f"{text[start:stop]} at {start} is {value[:20]}"
                try:
                    if not (is_found() or is_sealed):  # not every size is looked at
                        failures.append(f"{what}: passed")
                except Exception as error:
                    failures.append(f"{what}: {type(error).__name__}: {error}")
    count_cases(len(places) * len(SIZES))
    assert not failures, told(failures)


# ---- inputs


INPUTS: Mapping[str, Callable[[int], Path]] = {
    "sharded safetensors": sharded,
    "adapter": adapter,
    "torch": lambda step: save_checkpoint(Path(f"step-{step}"), weights(step), "torch"),
}


def inputs(kind: str, *, checksum: bool = False) -> list[Path]:
    """Average two checkpoints; return the files that count as inputs."""
    average_checkpoints([INPUTS[kind](step) for step in (1, 2)], OUT, checksum=checksum)
    assert verify_output(OUT).ok
    told = json.loads(PROVENANCE.read_text())["checkpoints"]
    return [Path(file["path"]) for one in told for file in one["files"]]


def test_weights_and_what_describes_them_count_as_inputs() -> None:
    found = {path.name for path in inputs("sharded safetensors")}
    assert found == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }


def test_an_adapters_config_counts_as_an_input() -> None:
    found = {path.name for path in inputs("adapter")}
    assert found == {"adapter_model.safetensors", "adapter_config.json"}


@pytest.mark.parametrize("kind", INPUTS)
def test_every_changed_byte_of_an_input_is_found_by_its_hash(
    kind: str, count_cases: CountCases
) -> None:
    """Size and time are as they were."""
    failures, n_cases = [], 0
    for path in inputs(kind, checksum=True):
        found, count = passed_over(
            path, lambda byte: byte ^ 0xFF, most=MAX_CHANGED_IN_INPUTS, keeps_time=True
        )
        failures += found
        n_cases += count
    count_cases(n_cases)
    assert not failures, told(failures)
    assert verify_output(OUT).ok


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("kind", INPUTS)
def test_another_size_of_an_input_is_found(
    kind: str, checksum: bool, count_cases: CountCases, capsys: pytest.CaptureFixture[str]
) -> None:
    n_cases = 0
    for path in inputs(kind, checksum=checksum):
        content, status = path.read_bytes(), path.stat()
        for changed in (b"", content[:-1], content[1:], content + b"\0", content + b"\n"):
            with restored(path):
                path.write_bytes(changed)
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
                assert is_found(), path
                check_command(capsys)
            n_cases += 1
    count_cases(n_cases)
    assert verify_output(OUT).ok


@pytest.mark.parametrize("kind", INPUTS)
def test_without_hashes_another_time_of_an_input_is_found(
    kind: str, count_cases: CountCases, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = inputs(kind)
    for path in paths:
        status = path.stat()
        for later_ns in (1, -1, 10**9):
            with restored(path):
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + later_ns))
                assert is_found(), path
                check_command(capsys)
    count_cases(3 * len(paths))
    assert verify_output(OUT).ok


def test_one_changed_input_is_told_apart_from_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in inputs("sharded safetensors", checksum=True):
        with restored(path):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0xFF
            path.write_bytes(content)
            (problem,) = verify_output(OUT).problems
            assert f"the source {path.parent} " in problem
            assert path.name in problem
            check_command(capsys)
