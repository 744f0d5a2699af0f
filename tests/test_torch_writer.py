"""The average as a torch file: the same bits, and a file like those that torch.save makes."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_contract import bytes_of, read_tensor, sample_tensors
from conftest import save_checkpoint, tree
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from ckptavg import (
    BnPass,
    IncompatibleCheckpointsError,
    OutputError,
    Recipe,
    UsageError,
    average_checkpoints,
    inspect_checkpoint,
    open_checkpoint,
    plan_average,
    recompute_bn,
)
from ckptavg import torch_writer as writer_module
from ckptavg.blocks import Action, TensorPlan
from ckptavg.tensors import COMPLEX32, FLOAT16, FLOAT32, DType, TensorInfo
from ckptavg.torch_writer import TorchFile

SCALED = (torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.int64)
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
MAPPED = pytest.mark.parametrize("mmap", [False, True])


def loaded(output: Path, *, mmap: bool = False) -> "OrderedDict[str, Tensor]":
    found = torch.load(output / "model.pt", weights_only=True, mmap=mmap)
    assert type(found) is OrderedDict
    return found


def check_whole(path: Path) -> None:
    """Check that a zip file is right in the eyes of Python, and that torch finds data aligned."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for member in archive.infolist():
            with path.open("rb") as file:
                file.seek(member.header_offset)
                header = file.read(30)
            assert int.from_bytes(header[14:18], "little") == member.CRC
            ends = sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
            assert (member.header_offset + 30 + ends) % 64 == 0


def several(tmp_path: Path, count: int = 3, **more: Tensor) -> list[Path]:
    """Save checkpoints with tensors of every dtype and shape, and a tied pair."""
    paths = []
    for step in range(1, count + 1):
        tensors = {
            name.replace("weight", "value"): value * step if value.dtype in SCALED else value
            for name, value in sample_tensors().items()
        }
        unsigned = {str(dtype)[6:]: torch.full((7,), step).to(dtype) for dtype in UNSIGNED}
        weight = torch.randn(300, 5, generator=torch.Generator().manual_seed(step))
        tensors = {"head": weight, **tensors, **unsigned, "tied.weight": weight, **more}
        paths.append(tmp_path / f"step-{step}.pt")
        torch.save({"state_dict": tensors}, paths[-1])
    return paths


# ---- what is in the file


@MAPPED
def test_all_dtypes_have_the_bits_of_the_safetensors_output(
    tmp_path: Path, device: str, mmap: bool
) -> None:
    paths = several(tmp_path)
    for output_format in ("safetensors", "torch"):
        average_checkpoints(
            paths, tmp_path / output_format, output_format=output_format,
            allow_nonfinite=True, device=device,
        )  # fmt: skip
    assert sorted(tree(tmp_path / "torch")) == ["ckptavg.json", "model.pt"]
    expected = load_file(tmp_path / "safetensors/model.safetensors")
    found = loaded(tmp_path / "torch", mmap=mmap)
    assert list(found) == list(torch.load(paths[-1])["state_dict"])
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape), name
        assert bytes_of(value) == bytes_of(expected[name]), name
        assert value.is_contiguous()
    check_whole(tmp_path / "torch/model.pt")


def test_its_own_reader_reads_it(tmp_path: Path) -> None:
    average_checkpoints(
        several(tmp_path), tmp_path / "out", output_format="torch", allow_nonfinite=True
    )
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.layout == "torch directory"
    assert checkpoint.aliases == {"tied.weight": "head"}
    for name, value in loaded(tmp_path / "out").items():
        assert read_tensor(checkpoint, name) == bytes_of(value)
    checkpoint.close()
    average_checkpoints(
        tmp_path / "out", tmp_path / "again", output_format="torch", allow_nonfinite=True
    )
    again, first = (tmp_path / name / "model.pt" for name in ("again", "out"))
    assert again.read_bytes() == first.read_bytes()


def test_its_members_are_those_of_torch(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "n": torch.tensor(1)}
    torch.save(tensors, tmp_path / "model.pt")
    average_checkpoints(tmp_path / "model.pt", tmp_path / "out", output_format="torch")
    names = [zipfile.ZipFile(tmp_path / one / "model.pt").namelist() for one in (".", "out")]
    # these two let torch compute where data lies, for files laid out just as its own
    assert names[1] == [
        name for name in names[0] if not name.endswith((".format_version", ".storage_alignment"))
    ]


def test_tied_tensors_share_one_storage(tmp_path: Path) -> None:
    paths = several(tmp_path)
    result = average_checkpoints(
        paths, tmp_path / "out", output_format="torch", allow_nonfinite=True
    )
    found = loaded(tmp_path / "out")
    assert found["head"].data_ptr() == found["tied.weight"].data_ptr()
    average_checkpoints(paths, tmp_path / "other", allow_nonfinite=True)
    told = [json.loads((tmp_path / one / "ckptavg.json").read_text()) for one in ("out", "other")]
    assert told[0]["output"]["format"] == "torch"
    assert told[0]["output"]["shards"] == ["model.pt"]
    assert told[1]["output"]["format"] == "safetensors"
    assert told[1]["output"]["nbytes"] - told[0]["output"]["nbytes"] == 300 * 5 * 4
    assert result.written_nbytes == told[0]["output"]["nbytes"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_tied_names_that_safetensors_left_out_are_there_again(tmp_path: Path) -> None:
    paths = []
    for step in (1, 2):
        paths.append(tmp_path / f"step-{step}.safetensors")
        torch.manual_seed(step)
        save_model(Tied(), str(paths[-1]))
    average_checkpoints(paths, tmp_path / "out", output_format="torch")
    found = loaded(tmp_path / "out")
    Tied().load_state_dict(found)
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()


def test_names_of_any_language_and_large_shapes_are_kept(tmp_path: Path) -> None:
    tensors = {"größe.重み": torch.ones(300, 2), "__metadata__": torch.ones(1, 70_000, 1)}
    torch.save(tensors, tmp_path / "model.pt")
    average_checkpoints(tmp_path / "model.pt", tmp_path / "out", output_format="torch")
    assert {name: value.shape for name, value in loaded(tmp_path / "out").items()} == {
        name: value.shape for name, value in tensors.items()
    }


def test_equal_runs_give_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        paths = several(tmp_path)
        average_checkpoints(paths, tmp_path / name, output_format="torch", allow_nonfinite=True)
    first, second = (tmp_path / name / "model.pt" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_complex128_is_averaged_in_both_parts(tmp_path: Path, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(501, generator=generator, dtype=torch.complex128) for _ in range(4)]
    paths = [tmp_path / f"step-{step}.pt" for step in range(4)]
    for path, value in zip(paths, values, strict=True):
        torch.save({"z": value, "w": torch.ones(3)}, path)
    average_checkpoints(paths, tmp_path / "out", output_format="torch", device=device)
    pairs = [torch.view_as_real(value) for value in values]
    torch.testing.assert_close(
        torch.view_as_real(loaded(tmp_path / "out")["z"]), sum(pairs) / 4, rtol=1e-14, atol=1e-15
    )
    average_checkpoints([paths[0]] * 3, tmp_path / "same", output_format="torch", device=device)
    assert torch.equal(loaded(tmp_path / "same")["z"], values[0])


def test_a_complex128_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    for step, value in enumerate((1.0, float("nan"))):
        torch.save({"z": torch.full((3,), value + 0j, dtype=torch.complex128)},
                   tmp_path / f"step-{step}.pt")  # fmt: skip
    with pytest.raises(IncompatibleCheckpointsError, match=r"tensor 'z' .* has 3 non-finite"):
        average_checkpoints(f"{tmp_path}/*.pt", tmp_path / "out", output_format="torch")


def test_complex32_is_refused_in_any_format(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "z": torch.ones(2)}, tmp_path / "model.pt")
    checkpoint = open_checkpoint(tmp_path / "model.pt", label="a")
    checkpoint.tensors = {**checkpoint.tensors, "z": TensorInfo(COMPLEX32, (2,))}
    with pytest.raises(
        IncompatibleCheckpointsError, match="^a: tensor 'z' is complex32, which is not averaged$"
    ):
        plan_average([checkpoint], Recipe(), output_format="torch")


# ---- what is asked for


def test_a_torch_file_is_never_split(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "in", {"w": torch.ones(1000)}, "torch")
    with pytest.raises(UsageError) as caught:
        average_checkpoints(path, tmp_path / "out", output_format="torch", max_shard_bytes=1000)
    assert str(caught.value) == (
        "a torch file is never split: leave out max_shard_bytes (--max-shard-size), or write "
        "safetensors"
    )


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="^output_format is 'gguf', expected one of safetensors, torch$"
    ):
        average_checkpoints(
            tmp_path / "nothing.pt", tmp_path / "out",
            output_format="gguf",  # type: ignore[arg-type]  # that is the test
        )  # fmt: skip


def test_one_format_replaces_the_other(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "in", {"w": torch.ones(10)}, "torch")
    for output_format, name in (("torch", "pt"), ("safetensors", "safetensors"), ("torch", "pt")):
        average_checkpoints(
            path, tmp_path / "out", overwrite=True, output_format=output_format  # type: ignore[arg-type]  # one of both
        )  # fmt: skip
        assert sorted(tree(tmp_path / "out")) == ["ckptavg.json", f"model.{name}"]


def test_several_averages_are_those_of_runs_of_their_own(tmp_path: Path) -> None:
    paths = several(tmp_path)
    options: dict[str, Any] = {"output_format": "torch", "allow_nonfinite": True}
    schemes = ("uniform", "uniform:last=2")
    result = average_checkpoints(paths, tmp_path / "all", schemes=schemes, **options)
    for one in result.outputs:
        average_checkpoints(paths, tmp_path / "own", schemes=one.scheme, overwrite=True, **options)
        own = (tmp_path / "own/model.pt").read_bytes()
        assert (one.path / "model.pt").read_bytes() == own
        check_whole(one.path / "model.pt")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def bn_case(folder: Path, prefix: str = "") -> tuple[list[Path], BnPass]:
    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        paths.append(folder / f"e-{seed}.pt")
        state = network().state_dict()
        torch.save({f"{prefix}{name}": value for name, value in state.items()}, paths[-1])
    return paths, BnPass(model=network, batches=[torch.randn(32, 3), torch.randn(32, 3)])


def test_recomputed_statistics_are_put_in(tmp_path: Path) -> None:
    paths, bn_pass = bn_case(tmp_path)
    average_checkpoints(paths, tmp_path / "torch", output_format="torch", batchnorm=bn_pass)
    average_checkpoints(paths, tmp_path / "other", batchnorm=bn_pass)
    average_checkpoints(paths, tmp_path / "plain", output_format="torch")
    recompute_bn(tmp_path / "plain", tmp_path / "later", bn_pass, output_format="torch")
    expected = load_file(tmp_path / "other/model.safetensors")
    for name in ("torch", "later"):
        check_whole(tmp_path / name / "model.pt")
        found = loaded(tmp_path / name)
        network().load_state_dict(found)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert (tmp_path / "torch/model.pt").read_bytes() == (tmp_path / "later/model.pt").read_bytes()
    plain = loaded(tmp_path / "plain")
    assert not torch.equal(plain["1.running_var"], expected["1.running_var"])


def test_names_are_kept_through_the_batchnorm_pass(tmp_path: Path) -> None:
    paths, bn_pass = bn_case(tmp_path, prefix="module.")
    options: dict[str, Any] = {"output_format": "torch", "batchnorm": bn_pass}
    result = average_checkpoints(paths, tmp_path / "kept", keep_prefix=True, **options)
    average_checkpoints(paths, tmp_path / "bare", **options)
    bare, kept = loaded(tmp_path / "bare"), loaded(tmp_path / "kept")
    assert list(kept) == [f"module.{name}" for name in bare]
    assert all(torch.equal(kept[f"module.{name}"], value) for name, value in bare.items())
    assert f"the output keeps the prefixes that tensor names have in {paths[-1]}" in result.notes
    assert json.loads((tmp_path / "kept/ckptavg.json").read_text())["recipe"]["keep_prefix"] is True


# ---- directories


def test_a_directory_with_a_model_pt_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "run/model.pt")
    assert inspect_checkpoint(tmp_path / "run").layout == "torch directory"
    save_file({"v": torch.ones(2)}, tmp_path / "run/model.safetensors")
    assert list(inspect_checkpoint(tmp_path / "run").tensors) == ["v"]


# ---- interruptions


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    paths = []
    for step in range(1, 4):
        weight = torch.randn(9000, generator=generator)
        counts = {f"n{index}": torch.full((index,), step) for index in range(40)}
        paths.append(tmp_path / f"step-{step}.pt")
        torch.save({"w": weight, "tied": weight, **counts}, paths[-1])
    return paths


def whole(sources: list[Path], tmp_path: Path) -> bytes:
    average_checkpoints(sources, tmp_path / "whole", output_format="torch")
    return (tmp_path / "whole/model.pt").read_bytes()


def check_continued(sources: list[Path], tmp_path: Path, share: str | None) -> None:
    result = average_checkpoints(sources, tmp_path / "out", output_format="torch")
    continued = [note for note in result.notes if "continued an interrupted run" in note]
    if share is None:
        assert not continued
    else:
        assert continued == [
            f"{tmp_path}/out: continued an interrupted run; {share} of it was done"
        ]
    assert (tmp_path / "out/model.pt").read_bytes() == whole(sources, tmp_path)
    check_whole(tmp_path / "out/model.pt")
    assert sorted(tree(tmp_path / "out")) == ["ckptavg.json", "model.pt"]
    assert not list(tmp_path.glob("out.partial-*"))


def interrupt(*arguments: object, **options: object) -> Any:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("small_blocks")
def test_an_interrupted_run_is_continued(sources: list[Path], tmp_path: Path) -> None:
    calls: list[int] = []

    def fifth(stage: str, done: int, total: int | None) -> None:
        calls.append(done)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        average_checkpoints(
            sources, tmp_path / "out", progress=fifth, n_threads=1, output_format="torch"
        )
    check_continued(sources, tmp_path, "45 %")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("n_fields", [0, 1, 3, 60, 82])
def test_an_interruption_while_checksums_are_written_costs_no_work(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_fields: int
) -> None:
    sealed = TorchFile.sealed

    def some(self: TorchFile, path: Path, n_threads: int) -> Iterator[tuple[int, bytes]]:
        for number, field in enumerate(sealed(self, path, n_threads)):
            if number == n_fields:
                raise KeyboardInterrupt
            yield field

    with monkeypatch.context() as patched:
        patched.setattr(TorchFile, "sealed", some)
        with pytest.raises(KeyboardInterrupt):
            average_checkpoints(sources, tmp_path / "out", output_format="torch")
    check_continued(sources, tmp_path, "100 %")


def test_an_interruption_while_checksums_are_computed_costs_no_work(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(writer_module, "_crc_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            average_checkpoints(sources, tmp_path / "out", output_format="torch")
    check_continued(sources, tmp_path, "100 %")


def test_an_interruption_after_the_checksums_costs_no_work(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("ckptavg.steps.provenance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            average_checkpoints(sources, tmp_path / "out", output_format="torch")
    check_continued(sources, tmp_path, "100 %")


@pytest.mark.usefixtures("small_blocks")
def test_a_process_killed_while_it_wrote_checksums_is_continued(
    sources: list[Path], tmp_path: Path
) -> None:
    script = (
        "import os, signal, sys\n"
        "from ckptavg import average_checkpoints, blocks\n"
        "from ckptavg.torch_writer import TorchFile\n"
        "blocks.BLOCK_NBYTES = 4000\n"
        "sealed = TorchFile.sealed\n"
        "def some(*arguments):\n"
        "    for number, field in enumerate(sealed(*arguments)):\n"
        "        if number == 31: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield field\n"
        "TorchFile.sealed = some\n"
        "average_checkpoints(sys.argv[2:], sys.argv[1], output_format='torch')\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out"), *map(str, sources)], check=False
    )
    assert process.returncode == -signal.SIGKILL
    check_continued(sources, tmp_path, "100 %")


@pytest.mark.parametrize("place", ["first", "middle", "end"])
def test_a_damaged_file_is_made_anew(sources: list[Path], tmp_path: Path, place: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        average_checkpoints(
            sources, tmp_path / "out", n_threads=1, output_format="torch",
            progress=lambda *_: interrupt(),
        )  # fmt: skip
    (weights,) = tmp_path.glob("out.partial-*/model.pt")
    content = bytearray(weights.read_bytes())
    at = {"first": 0, "middle": content.rindex(b"model/data/3"), "end": len(content) - 3}[place]
    content[at] ^= 1
    weights.write_bytes(content)
    check_continued(sources, tmp_path, None)


def test_statistics_put_in_are_never_taken_for_averaged_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, bn_pass = bn_case(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(writer_module, "_crc_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            average_checkpoints(paths, tmp_path / "out", output_format="torch", batchnorm=bn_pass)
    check_continued(paths, tmp_path, None)


@pytest.mark.parametrize("call", ["preadv", "pwrite"])
def test_storage_that_fails_at_the_checksums_publishes_nothing(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    sealed = TorchFile.sealed

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def failing(*arguments: Any) -> Iterator[tuple[int, bytes]]:
        monkeypatch.setattr(f"os.{call}", fail)
        return sealed(*arguments)

    monkeypatch.setattr(TorchFile, "sealed", failing)
    with pytest.raises(OutputError, match="cannot be written: input/output error; nothing was"):
        average_checkpoints(sources, tmp_path / "out", output_format="torch")
    assert not list(tmp_path.glob("out*"))


def test_a_file_that_became_shorter_publishes_nothing(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = TorchFile.sealed

    def cut(self: TorchFile, path: Path, n_threads: int) -> Iterator[tuple[int, bytes]]:
        os.truncate(path, 2000)
        return sealed(self, path, n_threads)

    monkeypatch.setattr(TorchFile, "sealed", cut)
    with pytest.raises(OutputError, match=r"cannot be written: model/data/\d+ ended at byte \d+;"):
        average_checkpoints(sources, tmp_path / "out", output_format="torch")


# ---- the layout alone


def planned(name: str, numel: int, offset: int, dtype: DType = FLOAT32) -> TensorPlan:
    return TensorPlan(name, TensorInfo(dtype, (numel,)), dtype, Action.AVERAGE, None, 0, offset)


def write_known(file: TorchFile, path: Path) -> None:
    """Make the file, all that depends on the data a hole."""
    with path.open("wb") as opened:
        os.ftruncate(opened.fileno(), file.nbytes)
        for position, content in file.known:
            assert os.pwrite(opened.fileno(), content, position) == len(content)


def test_sizes_and_positions_beyond_4_gib_are_found(tmp_path: Path) -> None:
    """The file is sparse: it takes no room, and only its ends are read."""
    sizes = {"a": (10, FLOAT32), "large": (5 * 2**30, FLOAT16), "b": (6, FLOAT32)}
    tensors, offset = [], 0
    for name, (numel, dtype) in sizes.items():
        tensors.append(planned(name, numel, offset, dtype))
        offset += tensors[-1].nbytes
    file = TorchFile(tensors, list(sizes), {}, "model")
    path = tmp_path / "model.pt"
    write_known(file, path)
    ((position, nbytes),) = file.places(tensors[2].offset, 24)
    assert (nbytes, position % 64) == (24, 0)
    with path.open("r+b") as opened:
        os.pwrite(opened.fileno(), torch.arange(6.0).numpy().tobytes(), position)
    found = torch.load(path, weights_only=True, mmap=True)
    assert found["large"].shape == (5 * 2**30,)
    assert found["large"][-1] == 0
    assert found["b"].tolist() == [0, 1, 2, 3, 4, 5]
    checkpoint = open_checkpoint(path)
    assert read_tensor(checkpoint, "b") == bytes_of(found["b"])
    checkpoint.close()
    with zipfile.ZipFile(path) as archive:
        large, b = archive.getinfo("model/data/1"), archive.getinfo("model/data/2")
        assert (large.file_size, large.compress_size) == (10 * 2**30, 10 * 2**30)
        assert b.header_offset > 10 * 2**30
        with path.open("rb") as opened:
            opened.seek(large.header_offset + 18)
            assert opened.read(8) == b"\xff" * 8  # the sizes are in the extra field


def test_more_members_than_16_bits_count_are_found(tmp_path: Path) -> None:
    tensors = [planned(f"t{index}", 1, 4 * index) for index in range(66_000)]
    file = TorchFile(tensors, [tensor.name for tensor in tensors], {}, "model")
    write_known(file, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        assert len(archive.namelist()) == 66_004
    checkpoint = open_checkpoint(tmp_path / "model.pt")
    assert len(checkpoint.tensors) == 66_000
    checkpoint.close()


def test_every_byte_of_the_data_has_one_place() -> None:
    numels = [3, 0, 1, 0, 0, 200, 7, 0]
    tensors, offset = [], 0
    for index, numel in enumerate(numels):
        tensors.append(planned(f"t{index}", numel, offset))
        offset += 4 * numel
    file = TorchFile(tensors, [tensor.name for tensor in tensors], {}, "model")
    position_of = {}
    for index in range(offset):
        ((position_of[index], count),) = file.places(index, 1)
        assert count == 1
    assert len(set(position_of.values())) == offset
    for position, content in file.known:
        assert not set(position_of.values()) & set(range(position, position + len(content)))
    choose = random.Random(0)
    for _ in range(200):
        start, stop = sorted(choose.choices(range(offset + 1), k=2))
        places = list(file.places(start, stop - start))
        assert [at + n for at, count in places for n in range(count)] == [
            position_of[index] for index in range(start, stop)
        ]
