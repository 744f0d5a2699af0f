"""Comparing checkpoints: inner products of one pass over them, files, and the command."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FORMATS, MakeCheckpoint, save_checkpoint, tree
from hub_fixtures import REPO, save_steps, upload
from loopback_hub import LoopbackHub
from numpy.typing import NDArray
from safetensors.torch import save_file
from test_processes import torchrun
from torch import Tensor

from ckptavg import (
    IncompatibleCheckpointsError,
    OutputError,
    Selection,
    UsageError,
    average_checkpoints,
    open_checkpoint,
    trajectory,
)
from ckptavg.cli import run
from ckptavg.geometry import Geometry

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def tensors(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    centre = torch.Generator().manual_seed(1000)
    shapes = {
        "stem.weight": (3, 5, 7),
        "blocks.0.weight": (40, 50),
        "blocks.0.bias": (40,),
        "blocks.1.weight": (1001,),
        "head.weight": (11, 13),
    }
    found = {
        name: (
            torch.randn(shape, generator=centre) + 0.3 * torch.randn(shape, generator=generator)
        ).to(dtype)
        for name, shape in shapes.items()
    }
    found["blocks.0.running_mean"] = torch.randn(40, generator=generator)
    found["blocks.0.running_var"] = torch.rand(40, generator=generator)
    found["blocks.0.num_batches_tracked"] = torch.tensor(step)
    return found


@pytest.fixture
def checkpoints(make_checkpoint: MakeCheckpoint) -> list[Path]:
    return [
        make_checkpoint(f"step-{step}", tensors(step), FORMATS[step % len(FORMATS)])
        for step in range(6)
    ]


def weights(states: list[dict[str, Tensor]], beginning: str = "") -> NDArray[np.float64]:
    return np.stack(
        [
            torch.cat(
                [
                    value.double().flatten()
                    for name, value in state.items()
                    if name.startswith(beginning) and "running" not in name and "num" not in name
                ]
            ).numpy()
            for state in states
        ]
    )


def geometry_of(points: NDArray[np.float64]) -> Geometry:
    rows = np.vstack([points - points.mean(axis=0), points.mean(axis=0)])
    return Geometry(rows @ rows.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_equals_a_float64_computation_on_loaded_weights(
    make_checkpoint: MakeCheckpoint, device: str, dtype: torch.dtype
) -> None:
    states = [tensors(step, dtype) for step in range(6)]
    paths = [make_checkpoint(f"{at}", state) for at, state in enumerate(states)]
    result = trajectory(paths, device=device)
    expected = geometry_of(weights(states))
    scale = float(np.abs(expected.gram).max())
    np.testing.assert_allclose(result.gram, expected.gram, rtol=1e-9, atol=1e-9 * scale)
    np.testing.assert_allclose(result.distances, expected.distances, rtol=1e-9)
    np.testing.assert_allclose(result.cosines, expected.cosines, rtol=1e-9)
    np.testing.assert_allclose([one.norm for one in result.checkpoints], expected.norms, rtol=1e-9)
    np.testing.assert_allclose(
        [one.deviation for one in result.checkpoints], expected.deviations, rtol=1e-9
    )
    np.testing.assert_allclose(
        np.abs([one.coordinates for one in result.checkpoints]),
        np.abs(expected.coordinates(5)),
        rtol=1e-7, atol=1e-9 * math.sqrt(scale),
    )  # fmt: skip
    np.testing.assert_allclose(result.explained[:5], expected.explained[:5], rtol=1e-9)
    times = list(range(6))
    told = (
        result.mean_norm, result.norm_ratio, result.spread, result.effective_count,
        result.drift_share, result.taken_back,
    )  # fmt: skip
    taken_back = expected.taken_back()
    assert taken_back is not None
    assert told == pytest.approx(
        (
            expected.mean_norm, expected.norm_ratio, expected.spread,
            expected.effective_count(times), expected.drift_share(times), taken_back[0],
        ),
        rel=1e-9, abs=1e-12,
    )  # fmt: skip
    assert result.n_elements == len(weights(states)[0])
    assert result.device == ("cpu" if device == "cpu" else "cuda:0")


def test_layers_add_up_to_the_whole(checkpoints: list[Path], device: str) -> None:
    states = [tensors(step) for step in range(6)]
    result = trajectory(checkpoints, device=device)
    stored = open_checkpoint(checkpoints[-1]).tensors
    floats = [name for name in stored if not re.search("running|tracked", name)]
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in floats))
    assert [layer.name for layer in result.layers] == names
    assert set(names) == {"stem", "blocks.0", "blocks.1", "head"}
    for layer in result.layers:
        expected = geometry_of(weights(states, layer.name))
        np.testing.assert_allclose(layer.gram, expected.gram, rtol=1e-9, atol=1e-9)
        assert (layer.norm, layer.spread) == pytest.approx((expected.mean_norm, expected.spread))
        assert layer.moved == pytest.approx(float(expected.distances[0, -1]), rel=1e-9)
        assert layer.n_elements == len(weights(states, layer.name)[0])
    np.testing.assert_allclose(
        np.sum([layer.gram for layer in result.layers], axis=0), result.gram, rtol=1e-9, atol=1e-9
    )
    assert sum(layer.variance_share for layer in result.layers) == pytest.approx(1)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_how_the_work_is_cut_changes_no_more_than_the_last_digits(
    checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch, n_threads: int, small_blocks: None
) -> None:
    expected = geometry_of(weights([tensors(step) for step in range(6)]))
    monkeypatch.setattr("ckptavg.average.cpu._MIN_CHUNK_NBYTES", 256)
    monkeypatch.setattr("ckptavg.average.cpu._STACK_OF_CHUNKS_NBYTES", 6 * 256)
    monkeypatch.setattr("ckptavg.average.gram._TILE_NUMEL", 48)
    monkeypatch.setattr("ckptavg.average.gram._STRIP_NUMEL", 16)
    result = trajectory(checkpoints, device="cpu", n_threads=n_threads)
    np.testing.assert_allclose(result.gram, expected.gram, rtol=1e-9, atol=1e-9)
    assert result.n_elements == len(weights([tensors(0)])[0])


def test_differences_that_are_small_beside_the_weights_are_exact(
    make_checkpoint: MakeCheckpoint, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    centre = 100 * torch.randn(5000, generator=generator).double()
    states = [
        {"w": centre + 1e-6 * torch.randn(5000, generator=generator).double()} for _ in range(4)
    ]
    result = trajectory(
        [make_checkpoint(f"{at}", state) for at, state in enumerate(states)], device=device
    )
    points = weights(states)
    differences = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.testing.assert_allclose(result.distances, differences, rtol=1e-9)
    assert result.kind == "equal"


def test_batchnorm_statistics_counters_and_second_names_do_not_count(
    tmp_path: Path, device: str
) -> None:
    paths = []
    for step in range(3):
        state = tensors(step)
        state["tied.weight"] = state["head.weight"]
        torch.save(state, tmp_path / f"{step}.pt")
        paths.append(tmp_path / f"{step}.pt")
    result = trajectory(paths, device=device)
    assert result.n_elements == len(weights([tensors(0)])[0])


def test_complex_weights_count_as_pairs(make_checkpoint: MakeCheckpoint, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(30, 30, dtype=torch.complex64, generator=generator)}
              for _ in range(3)]  # fmt: skip
    result = trajectory([make_checkpoint(f"{at}", one) for at, one in enumerate(states)],
                        device=device)  # fmt: skip
    points = np.stack([torch.view_as_real(one["w"]).double().flatten().numpy() for one in states])
    np.testing.assert_allclose(result.distances, geometry_of(points).distances, rtol=1e-9)


def test_checkpoints_of_different_dtypes_are_compared(make_checkpoint: MakeCheckpoint) -> None:
    states = [tensors(0), tensors(1, torch.bfloat16), tensors(2, torch.float64)]
    paths = [make_checkpoint(f"{at}", state) for at, state in enumerate(states)]
    result = trajectory(paths)
    np.testing.assert_allclose(result.distances, geometry_of(weights(states)).distances, rtol=1e-9)
    assert any("float64" in note for note in result.notes)


def test_weight_normed_layers_are_compared_as_they_are_stored(
    make_checkpoint: MakeCheckpoint,
) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [
        {"c.weight_g": torch.rand(4, 1, generator=generator),
         "c.weight_v": torch.randn(4, 6, generator=generator)}
        for _ in range(3)
    ]  # fmt: skip
    result = trajectory([make_checkpoint(f"{at}", one) for at, one in enumerate(states)])
    np.testing.assert_allclose(result.distances, geometry_of(weights(states)).distances, rtol=1e-9)


def test_a_value_that_is_not_finite_is_named(make_checkpoint: MakeCheckpoint, device: str) -> None:
    paths = []
    for step in range(3):
        state = tensors(step)
        if step == 1:
            state["blocks.0.weight"][7, 3] = math.nan
        paths.append(make_checkpoint(f"{step}", state))
    message = r"1\.safetensors: tensor 'blocks.0.weight' in checkpoint 2 of 3 has 1 non-finite"
    with pytest.raises(IncompatibleCheckpointsError, match=message):
        trajectory(paths, device=device)


def test_infinities_that_all_share_are_passed_over(
    make_checkpoint: MakeCheckpoint, device: str
) -> None:
    states = [tensors(step) for step in range(3)]
    mask = torch.full((9, 9), -math.inf).triu(1)
    paths = [make_checkpoint(f"{at}", {**one, "mask": mask}) for at, one in enumerate(states)]
    result = trajectory(paths, device=device)
    np.testing.assert_allclose(result.distances, geometry_of(weights(states)).distances, rtol=1e-9)


def test_what_cannot_be_compared_is_refused(
    checkpoints: list[Path], make_checkpoint: MakeCheckpoint
) -> None:
    with pytest.raises(UsageError, match="is one checkpoint, expected at least two to compare"):
        trajectory(checkpoints[:1])
    other = make_checkpoint("other", {**tensors(0), "head.weight": torch.zeros(2, 2)})
    with pytest.raises(IncompatibleCheckpointsError, match=r"'head\.weight'"):
        trajectory([checkpoints[0], other])


def test_runs_are_expanded_and_selected_as_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for step in range(5):
        save_checkpoint(tmp_path / "run" / f"step-{step}", tensors(step), "safetensors")
    result = trajectory(tmp_path / "run", selection=Selection(last=3))
    assert [Path(one.source).name for one in result.checkpoints] == [
        "step-2.safetensors", "step-3.safetensors", "step-4.safetensors",
    ]  # fmt: skip
    assert [one.step for one in result.checkpoints] == [2, 3, 4]
    assert any("took 3 of 5" in note for note in result.notes)


def test_revisions_on_the_hub_are_streamed(hub: LoopbackHub, tmp_path: Path) -> None:
    saved = save_steps(tmp_path / "local")
    for directory in saved:
        upload(hub, directory)
    names = ",".join(directory.name for directory in saved)
    there, here = trajectory(f"{REPO}@{{{names}}}"), trajectory(saved)
    assert there.gram == here.gram
    assert there.checkpoints[0].source.startswith(REPO)


def test_files_hold_everything_and_appear_whole(checkpoints: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "new" / "trajectory"
    result = trajectory(checkpoints, output, command="ckptavg trajectory ...")
    assert result.output == output
    names = ("trajectory.json", "trajectory.csv", "trajectory.png", "trajectory.svg")
    assert result.files == names
    assert sorted(tree(output)) == sorted(names)
    told = json.loads((output / "trajectory.json").read_text())
    assert (told["kind"], told["verdict"]) == ("trajectory", result.kind)
    assert told["summary"] == list(result.summary)
    assert told["command"] == "ckptavg trajectory ..."
    np.testing.assert_allclose(told["gram"], result.gram, rtol=0)
    assert [layer["name"] for layer in told["layers"]] == [one.name for one in result.layers]
    rows = list(csv.DictReader((output / "trajectory.csv").read_text().splitlines()))
    assert [float(row["norm"]) for row in rows] == [one.norm for one in result.checkpoints]
    assert [row["step_length"] == "" for row in rows] == [True] + [False] * 5
    distances = [
        [float(row[f"distance {one.source}"]) for one in result.checkpoints] for row in rows
    ]
    np.testing.assert_allclose(distances, result.distances, rtol=0)
    assert (output / "trajectory.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.parent.iterdir()) == ["trajectory"]


def test_the_same_checkpoints_give_the_same_picture(
    checkpoints: list[Path], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        trajectory(checkpoints, tmp_path / name, n_threads=1)
    assert (tmp_path / "a/trajectory.svg").read_bytes() == (
        tmp_path / "b/trajectory.svg"
    ).read_bytes()


def test_an_output_that_is_there_is_replaced_only_when_asked_and_only_if_it_is_ours(
    checkpoints: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "trajectory"
    trajectory(checkpoints, output, plot=False)
    with pytest.raises(OutputError, match="already exists; pass --overwrite"):
        trajectory(checkpoints[:3], output, plot=False)
    trajectory(checkpoints[:3], output, plot=False, overwrite=True)
    assert len(json.loads((output / "trajectory.json").read_text())["checkpoints"]) == 3
    (output / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"also holds 'notes\.txt'"):
        trajectory(checkpoints, output, plot=False, overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"


def test_without_matplotlib_there_are_numbers_or_a_word(
    checkpoints: list[Path], tmp_path: Path, without_matplotlib: None
) -> None:
    message = r"a plot needs matplotlib: pip install 'ckptavg\[plots\]' \(or --no-plot\)"
    with pytest.raises(UsageError, match=message):
        trajectory(checkpoints, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    trajectory(checkpoints, tmp_path / "out", plot=False)
    assert trajectory(checkpoints).output is None


def test_progress_counts_the_bytes_that_are_read(checkpoints: list[Path]) -> None:
    seen: list[tuple[str, int, int | None]] = []
    result = trajectory(checkpoints, progress=lambda *told: seen.append(told))
    assert {stage for stage, _, _ in seen} == {"compare"}
    assert sum(done for _, done, _ in seen) == seen[0][2] == result.read_nbytes


def test_torch_is_not_imported_on_a_cpu(checkpoints: list[Path]) -> None:
    code = (
        "import sys; from ckptavg.cli import run; code = run(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    paths = [str(path) for path in checkpoints if path.suffix == ".safetensors"]
    command = [sys.executable, "-c", code, "trajectory", "--quiet", *paths]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0


# ---- along an average


def test_an_average_compares_along_the_way_from_the_same_read(
    checkpoints: list[Path], tmp_path: Path, device: str
) -> None:
    plain = average_checkpoints(checkpoints, tmp_path / "plain", device=device)
    result = average_checkpoints(
        checkpoints, tmp_path / "out", device=device, check_trajectory=True
    )
    assert plain.trajectory is None
    assert result.trajectory is not None
    assert result.read_nbytes == plain.read_nbytes
    expected = trajectory(checkpoints)
    np.testing.assert_allclose(result.trajectory.gram, expected.gram, rtol=1e-9, atol=1e-9)
    assert result.trajectory.kind == expected.kind
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        tmp_path / "plain/model.safetensors"
    ).read_bytes()
    notes = [f"trajectory ({expected.kind}): {one}" for one in expected.summary]
    told = json.loads((tmp_path / "out/ckptavg.json").read_text())
    for note in notes:
        assert note in result.notes
        assert note in json.dumps(told, ensure_ascii=False)


def test_what_no_average_reads_is_not_compared(checkpoints: list[Path], tmp_path: Path) -> None:
    result = average_checkpoints(
        checkpoints, tmp_path / "out", schemes="uniform:last=4", check_trajectory=True
    )
    assert result.trajectory is not None
    np.testing.assert_allclose(
        result.trajectory.gram, trajectory(checkpoints[2:]).gram, rtol=1e-9, atol=1e-9
    )
    one = average_checkpoints(checkpoints[:1], tmp_path / "one", check_trajectory=True)
    assert one.trajectory is None


def test_several_processes_put_their_products_together(tmp_path: Path) -> None:
    paths = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        paths.append(tmp_path / f"step-{step}.safetensors")
        save_file({"a": torch.randn(3000, generator=generator),
                   "b": torch.randn(2500, generator=generator)}, paths[-1])  # fmt: skip
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\nfrom pathlib import Path\nimport numpy as np\n"
        "from ckptavg import average_checkpoints, blocks\nblocks.BLOCK_NBYTES = 4000\n"
        "found = average_checkpoints(sys.argv[2:], Path(sys.argv[1], 'out'), distributed=True,\n"
        "                            check_trajectory=True)\n"
        "Path(sys.argv[1], os.environ['RANK']).write_text(json.dumps(found.trajectory.gram))\n"
    )
    done = torchrun(str(script), str(tmp_path), *map(str, paths))
    assert done.returncode == 0, done.stderr
    expected = trajectory(paths).gram
    for rank in ("0", "1"):
        told = json.loads((tmp_path / rank).read_text())
        np.testing.assert_allclose(told, expected, rtol=1e-9, atol=1e-9)


def test_a_run_that_is_continued_says_what_it_did_not_see(
    tmp_path: Path, small_blocks: None
) -> None:
    paths = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        paths.append(tmp_path / f"step-{step}.safetensors")
        save_file({"a": torch.randn(9000, generator=generator)}, paths[-1])
    count = 0

    def stop(stage: str, done: int, total: int | None) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        average_checkpoints(
            paths, tmp_path / "out", check_trajectory=True, progress=stop, n_threads=1
        )
    result = average_checkpoints(paths, tmp_path / "out", check_trajectory=True, n_threads=1)
    assert result.resumed_nbytes
    (note,) = [one for one in result.notes if "before the interruption" in one]
    assert "3000 values were averaged" in note or "4000 values were averaged" in note


# ---- the command


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_tells_the_verdict_points_and_layers(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(
        capsys, "trajectory", *checkpoints, "-o", tmp_path / "out", "--no-plot", "--device", "cpu"
    )
    assert code == 0, err
    expected = trajectory(checkpoints)
    lines = out.splitlines()
    assert lines[0] == f"6 checkpoints of {expected.n_elements:,} weights: bouncing"
    assert lines[1 : 1 + len(expected.summary)] == [f"  {one}" for one in expected.summary]
    assert "from the one before" in out
    for point, path in zip(expected.checkpoints, checkpoints, strict=True):
        (line,) = [one for one in lines if one.startswith(f"{path} ")]
        assert f"{point.norm:.5g}" in line.split()
    layers = [layer.name for layer in expected.layers]
    assert [line.split()[0] for line in lines if line.endswith("%")] == layers
    assert lines[-1] == f"{tmp_path / 'out'}: trajectory.json, trajectory.csv"


def test_json_is_what_python_returns(
    checkpoints: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "trajectory", *checkpoints, "--json", "--io-threads", "1")
    assert (code, err) == (0, "")
    told: Mapping[str, Any] = json.loads(out)
    expected = trajectory(checkpoints, n_threads=1)
    assert told["gram"] == [list(row) for row in expected.gram]
    assert told["kind"] == expected.kind
    assert told["checkpoints"][3]["source"] == str(checkpoints[3])


def test_epochs_are_told_where_there_are_no_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch in (3, 14):
        torch.save({"epoch": epoch, "model": {"w": torch.randn(4, 5)}}, tmp_path / f"{epoch}.pt")
    code, out, _ = call(capsys, "trajectory", tmp_path / "3.pt", tmp_path / "14.pt")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.startswith(("checkpoint", "/"))]
    assert [row[1] for row in rows] == ["epoch", "3", "14"]


def test_long_tables_are_cut_in_the_middle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in range(60):
        save_file({"w": torch.randn(5)}, tmp_path / f"step-{step:02d}.safetensors")
    code, out, _ = call(capsys, "trajectory", tmp_path / "step-*.safetensors", "--quiet")
    assert code == 0
    assert "... 20 more (--json, -o)" in out
    assert "step-59" in out


def test_errors_have_the_codes_of_all_commands(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "trajectory", checkpoints[0])[0] == 2
    assert call(capsys, "trajectory", tmp_path / "nothing")[0] == 1
    broken = tmp_path / "broken.safetensors"
    shutil.copyfile(checkpoints[0], broken)
    broken.write_bytes(broken.read_bytes()[:-4])
    code, out, err = call(capsys, "trajectory", checkpoints[1], broken)
    assert (code, out) == (1, "")
    assert "truncated" in err


def test_average_says_what_it_saw_along_the_way(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(
        capsys, "average", *checkpoints, "-o", tmp_path / "out", "--check-trajectory"
    )
    assert code == 0
    assert "note: trajectory (bouncing): one trajectory that bounces" in err
