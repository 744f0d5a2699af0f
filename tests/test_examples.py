"""Every file in examples/ runs, and shows what it claims."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quick_start_shows_what_averaging_and_the_bn_pass_bring(tmp_path: Path) -> None:
    pytest.importorskip("mnist1d", reason="needs the extra 'examples'")
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), "--work-dir", str(tmp_path / "work")],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    accuracy = {
        row: float(value)
        for row, value in re.findall(
            r"^(\S.*?)\s{2,}([\d.]+)\s+[\d.]+$", result.stdout, re.MULTILINE
        )
    }
    # bounds far from the worst of five seeds
    assert accuracy["SWA + BN pass"] >= 95
    assert accuracy["SWA + BN pass"] - accuracy["last checkpoint"] >= 3
    assert accuracy["SWA + BN pass"] - accuracy["last checkpoint + BN pass"] >= 1
    assert accuracy["SWA, no BN pass, BN statistics of the last"] <= 90
    assert "checked: every weight is the float64 mean of the checkpoints" in result.stdout
    assert "checked: the first BN layer's statistics" in result.stdout
    assert sorted(path.name for path in (tmp_path / "work" / "swa").iterdir()) == [
        "ckptavg.json",
        "model.safetensors",
    ]


def test_batchnorm_table_shows_what_the_pass_and_its_estimators_bring(tmp_path: Path) -> None:
    pytest.importorskip("mnist1d", reason="needs the extra 'examples'")
    script = [sys.executable, str(EXAMPLES / "batchnorm_table.py"), "--seeds", "0"]
    result = subprocess.run(
        [*script, "--work-dir", str(tmp_path / "work")],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    accuracy = {
        row: float(value)
        for row, value in re.findall(r"^  (\S.*?)\s{2,}([\d.]+) ± [\d.]+$", result.stdout, re.M)
    }
    # bounds far from the worst of five seeds
    assert accuracy["average + BN pass"] >= 95
    assert accuracy["average + BN pass"] - accuracy["last checkpoint + BN pass"] >= 1
    assert abs(accuracy["average + BN pass"] - accuracy["average, BN statistics averaged"]) <= 1.5
    assert accuracy["average, BN statistics of the last"] <= 90
    assert accuracy["average, BN statistics of a new model"] <= 60
    error = {
        row: [float(value) for value in values.split()]
        for row, values in re.findall(r"^  (s\S+,? .*?)\s{2,}([\d. e-]+)$", result.stdout, re.M)
    }
    assert len(error) == 4
    for population, paper, torch in error.values():
        assert population <= 1e-4
        assert population < min(paper, torch)
    assert error["shuffled, the last batch ragged"][2] >= 1
    assert min(error["sorted by digit, batches of 100"][1:]) >= 1


def test_the_sweep_shows_which_averages_tie_and_which_lose(tmp_path: Path) -> None:
    pytest.importorskip("mnist1d", reason="needs the extra 'examples'")
    script = [sys.executable, str(EXAMPLES / "mnist1d_sweep.py"), "--seeds", "0"]
    result = subprocess.run(
        [*script, "--work-dir", str(tmp_path / "work")],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    rows = re.findall(r"^(\S.*?)\s{2,}([\d.]+) ± [\d.]+\s", result.stdout, re.MULTILINE)
    assert len(rows) == 16 + 5
    assert len(re.findall(r"^yes ", result.stdout, re.MULTILINE)) == 4
    assert (tmp_path / "work" / "seed-0" / "best" / "sweep.json").exists()


def test_the_language_model_is_averaged_and_decayed(tmp_path: Path) -> None:
    script = [sys.executable, str(EXAMPLES / "shakespeare_lm.py"), "--seeds", "0"]
    options = ["--stable", "20", "--more", "20", "--text", str(EXAMPLES / "quickstart.py")]
    result = subprocess.run(
        [*script, *options, "--work-dir", str(tmp_path / "work")],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    losses = dict(re.findall(r"^(\S.*?)\s{2,}([\d.]+) ± [\d.]+\s", result.stdout, re.MULTILINE))
    assert len(losses) == 1 + 3 + 12
    assert len(list((tmp_path / "work" / "seed-0").glob("step-*.pt"))) == 21
    assert max(map(float, losses.values())) < 5  # nats; nearly 4.5 for a model that knows nothing
