"""The paper, reproduced small, runs end to end at sizes that mean nothing."""

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAPER = Path(__file__).parent.parent / "examples" / "paper"
ROWS_OF_TABLE_1 = 14


def run_example(script: str, *options: str, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, str(PAPER / script), "--tiny", *options],
        capture_output=True, text=True, cwd=folder, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_paper_is_reproduced_from_training_to_the_page(tmp_path: Path) -> None:
    pytest.importorskip("mnist1d", reason="needs the extra 'examples'")
    pytest.importorskip("matplotlib", reason="needs the extra 'plots'")
    options = ["--setups", "noisy", "--seeds", "0", "1", "--output", "out"]
    printed = run_example("reproduce.py", *options, folder=tmp_path)
    output = tmp_path / "out"

    rows = re.findall(r"^\| (\S.*?) +\|(?: [\d. ±]{14} \|){3}$", printed, re.MULTILINE)
    assert len(rows) == ROWS_OF_TABLE_1
    cells = json.loads((output / "table1-noisy.json").read_text(encoding="utf-8"))["cells"]
    assert len(cells) == 2 * (3 * 10 + 4)  # accuracy and NLL; the fixed rate has one budget
    for cell in cells:
        assert len(cell["values"]) == 2, cell
        top = 100 if cell["metric"] == "accuracy" else 20
        assert all(0 < value < top for value in cell["values"]), cell

    for name, last_epochs in (("fig6", {8, 12}), ("fig7", {12})):
        with (output / f"{name}-noisy.csv").open(newline="", encoding="utf-8") as file:
            points = list(csv.DictReader(file))
        assert {max(epochs) for epochs in by_curve(points).values()} == last_epochs
        assert all(0 <= float(point["mean"]) <= 100 for point in points)
    for folder, command in (
        ("fig1-left", "plane"), ("fig1-right", "plane"), ("fig3", "plane"), ("fig4", "width"),
        ("fig5", "path"), ("fig5-barriers", "path"),
    ):  # fmt: skip
        files = {path.name for path in (output / f"{folder}-noisy").iterdir()}
        assert files == {f"{command}.{kind}" for kind in ("json", "csv", "png", "svg")}

    page = (output / "index.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert len(pictures) == 8
    assert all((output / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert len(re.findall(r"^- (?:yes|no|NO): ", page, re.MULTILINE)) >= 20


def by_curve(points: list[dict[str, str]]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for point in points:
        found.setdefault(point["curve"], set()).add(int(point["epoch"]))
    return found


def test_a_language_model_is_averaged_and_decayed_within_its_time(tmp_path: Path) -> None:
    options = ["--only", "lm", "--device", "cpu", "--stable", "200000", "--more", "1000"]
    printed = run_example("large.py", *options, "--minutes", "0.03", folder=tmp_path)
    output = tmp_path / "paper-large-output"
    assert "ms a step" in printed

    report = json.loads((output / "lm.json").read_text(encoding="utf-8"))
    steps = report["trained"]["sizes"]
    assert steps["stable_steps"] < 200000  # cut to what time allows
    assert steps["more_steps"] % steps["n_checkpoints"] == 0
    assert len(list((output / "runs" / "lm").glob("step-*.pt"))) == 1 + steps["n_checkpoints"]
    losses = report["val_loss"]
    assert len(losses) == 2 + 16
    assert max(losses.values()) < math.log(256)  # what a model that knows nothing has
    assert min(report["singles"]) <= losses["last checkpoint (constant)"]
    table = (output / "lm.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\| .* \| +-?\d+% \|$", table, re.MULTILINE)) == len(losses)
