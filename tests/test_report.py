"""Reports: what the page tells is what the files tell, and nothing in them can act."""

import errno
import itertools
import json
import os
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, tree
from html_document import Document
from search_fixtures import Net, batches, enter_with_module
from torch import nn

from ckptavg import (
    BnPass,
    OutputError,
    ReportError,
    average_checkpoints,
    greedy_soup,
    sweep,
    verify_output,
    write_report,
)
from ckptavg.cli import run
from ckptavg.evidence_files import data_files, evidence
from ckptavg.evidence_names import is_report
from ckptavg.report.figures import number, short_labels
from ckptavg.report.style import STYLE
from ckptavg.units import size

HOSTILE = "<script>alert(1)</script>\"'&\u202eabc\x1b[31m\x00\n]]>"
SHOWN = "<script>alert(1)</script>\"'&\\u202eabc\\x1b[31m\\x00\\n]]>"
SVG = (
    b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
)
PNG = b"\x89PNG\r\n\x1a\n and so on"


def save_run(folder: Path, count: int = 4) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for step in range(1, count + 1):
        model = Net()
        nn.init.constant_(model.linear.weight, float(step))
        model.bn.num_batches_tracked = torch.tensor(10 * step)
        paths.append(save_checkpoint(folder / f"step{step}", model.state_dict(), "safetensors"))
    return paths


def look(model: nn.Module) -> dict[str, float]:
    state = model.state_dict()
    return {"loss": state["linear.weight"].mean().item(), "mean": state["bn.running_mean"].item()}


JUDGED = BnPass(model=Net, batches=batches, evaluate=look)
COMPARED = BnPass(model=Net, batches=batches, evaluate=look, compare=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an average with a BatchNorm pass and a comparison; copy it to change it."""
    folder = tmp_path_factory.mktemp("made")
    average_checkpoints(save_run(folder / "runs"), folder / "swa", batchnorm=COMPARED)
    return folder / "swa"


@pytest.fixture
def swa(made: Path, tmp_path: Path) -> Path:
    """Return a copy of that average."""
    for name, content in tree(made).items():
        (tmp_path / "swa").mkdir(exist_ok=True)
        (tmp_path / "swa" / name).write_bytes(content)
    return tmp_path / "swa"


def told(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "ckptavg.json").read_text())
    return found


def change(output: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = told(output)
    edit(content)
    (output / "ckptavg.json").write_text(json.dumps(content))


def page(output: Path, given: Sequence[str | Path] = ()) -> Document:
    """Write a report, and return it; what holds for all pages is checked here."""
    result = write_report(output, given, overwrite=True)
    text = result.path.read_text()
    found = Document(text)
    assert result.nbytes == len(text.encode())
    assert found.one("html").get("lang") == "en"
    assert "default-src 'none'" in text
    assert not found.all("script")
    assert not any(name.startswith("on") for one in found.elements for name in one.attributes)
    for one in found.elements:
        assert one.get("src").startswith("data:image/") or "src" not in one.attributes
        if one.tag == "a" and not one.get("href").startswith("#"):
            assert one.get("href").startswith("https://huggingface.co/")
        assert one.tag == "a" or "href" not in one.attributes
        assert one.tag != "img" or one.get("alt")
    ids = [one.get("id") for one in found.elements if one.get("id")]
    assert len(set(ids)) == len(ids)
    links = {one.get("href").removeprefix("#") for one in found.all("a") if "#" in one.get("href")}
    assert links <= set(ids)
    levels = [int(one.tag[1]) for one in found.elements if one.tag in ("h1", "h2", "h3")]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    return found


def save_evidence(
    folder: Path, kind: str = "plane", name: str | None = None, **changes: Any
) -> Path:
    """Save the figures of a measurement."""
    folder.mkdir(parents=True, exist_ok=True)
    content = evidence(
        kind, f"the {kind}", ["the first thing", "the second thing"], ["how it was done"],
        {"numbers": [0.5]}, command=f"ckptavg {kind} runs",
    )  # fmt: skip
    for file, text in data_files(name or kind, content | changes, [["a"], [1]]).items():
        (folder / file).write_bytes(text)
    return folder / f"{name or kind}.json"


# ---- one model


def test_the_page_tells_what_the_provenance_tells(swa: Path) -> None:
    found, content = page(swa), told(swa)
    assert found.headings == [
        "swa", "Notes", "Checkpoints", "Tensors", "BatchNorm", "Evaluation", "Provenance",
    ]  # fmt: skip
    notes = [one.text for one in found.all("li") if one.text not in found.one("nav").text]
    assert notes == [f"{note}." for note in content["notes"]]
    checkpoints = found.table("Checkpoints")
    assert checkpoints.header == ["checkpoint", "step", "coefficient", "size"]
    assert [row[:3] for row in checkpoints.rows] == [
        [Path(one["source"]).name, str(one["step"]), f"{one['coefficient']:.6g}"]
        for one in content["checkpoints"]
    ]
    (layer,) = content["batchnorm"]["layers"]
    low, high = layer["variance_ratio"]
    assert found.table("BatchNorm layers").rows == [
        [layer["name"], "1", f"{layer['mean_shift']:.3g} sd", f"{low:.3g} to {high:.3g}"]
    ]
    comparison = found.table("Evaluation")
    assert comparison.header == ["", "loss", "mean"]
    assert comparison.rows == [
        [row["name"], *(number(row["metrics"][name]) for name in ("loss", "mean"))]
        for row in content["comparison"]
    ]
    assert comparison.out == [len(comparison.rows) - 1]
    assert found.table("Files").rows == [
        [one["name"], f"{one['nbytes']} B", one["sha256"]] for one in content["output"]["files"]
    ]


def test_the_first_screen_tells_what_the_model_is(swa: Path) -> None:
    header = page(swa).one("header").text
    assert "The mean of 4 checkpoints (steps 1 to 4), with BatchNorm statistics" in header
    assert "loss2.51.5 better than the last checkpoint + BN pass (4)" in header
    assert "schemeuniform" in header
    assert "recomputed1 layer, 3 samples" in header


def test_without_a_pass_or_a_metric_there_is_no_section_about_it(tmp_path: Path) -> None:
    average_checkpoints(save_run(tmp_path / "runs"), tmp_path / "swa")
    found = page(tmp_path / "swa")
    assert found.headings == ["swa", "Notes", "Checkpoints", "Tensors", "Provenance"]
    assert "BatchNorm statisticsnot recomputed" in found.one("header").text


def test_what_became_of_the_tensors_is_told(swa: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["tensors"]["tied"] = {"head.weight": "embedding.weight"}
        content["tensors"]["derived"] = {"weight_norm": [f"layer{n}" for n in range(9)]}
        content["adapter"] = {
            "method": "truncation", "rank": 16, "error": 0.125, "largest_error": 0.25,
            "largest_error_module": "q_proj",
        }  # fmt: skip
        content["recipe"]["allow_nonfinite"] = True

    change(swa, edit)
    facts = {one.text for one in page(swa).elements if one.get("class") == "fact"}
    assert "averaged5 tensors (5 float32)" in facts
    assert "copied1 integer or bool tensor: bn.num_batches_tracked" in facts
    assert "tied, averaged once1 tensor: head.weight = embedding.weight" in facts
    modules = ", ".join(f"layer{n}" for n in range(9))
    assert f"computed as weight_norm9 modules{modules}" in {one.replace("\n", "") for one in facts}
    assert (
        "adaptersby truncation, rank 16, off the mean of the products by 0.125 of its norm, by at "
        "most 0.25 in a module (q_proj)"
    ) in facts
    assert "values that are not finitekept" in facts


def test_negative_coefficients_are_set_off_and_orders_named(swa: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        for one, value in zip(content["checkpoints"], (2.0, -1.5, 0.25, 0.25), strict=True):
            one["coefficient"] = value

    change(swa, edit)
    found = page(swa)
    assert [row[2] for row in found.table("Checkpoints").rows] == ["2", "−1.5", "0.25", "0.25"]  # noqa: RUF001 - a minus sign
    assert [one.get("class") for one in found.all("rect")[:4]] == ["plus", "minus", "plus", "plus"]
    assert "2 coefficients below zero" not in found.one("body").text
    assert "1 coefficient below zero" in found.one("body").text
    assert "The weighted mean of 4 checkpoints" in found.one("header").text


def test_a_median_has_no_coefficients(tmp_path: Path) -> None:
    average_checkpoints(save_run(tmp_path / "runs"), tmp_path / "swa", schemes=["median"])
    found = page(tmp_path / "swa")
    assert [row[2] for row in found.table("Checkpoints").rows] == ["median"] * 4
    assert "The median of 4 checkpoints" in found.one("header").text
    assert "of every value the median is taken" in found.one("body").text


def test_long_lists_are_folded(swa: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        one, layer = content["checkpoints"][0], content["batchnorm"]["layers"][0]
        content["checkpoints"] = [
            {**one, "source": f"runs/{'x' * 80}-{n}", "step": n, "coefficient": n / 4950}
            for n in range(100)
        ]
        content["batchnorm"]["layers"] = [
            {**layer, "name": f"bn{n}", "mean_shift": float(n)} for n in range(50)
        ]

    change(swa, edit)
    found = page(swa)
    folded = [one.text for one in found.all("summary")]
    assert "All 100 checkpoints" in folded
    assert "All 50 layers" in folded
    assert len(found.table("Checkpoints").rows) == 100
    furthest = found.table("Layers that moved furthest").rows
    assert [row[0] for row in furthest] == [f"bn{n}" for n in range(49, 39, -1)]
    (strip,) = [one for one in found.all("svg") if one.get("role") == "img"]
    assert strip.get("aria-label") == "Coefficients, oldest first: 0 to 0.02"
    names = [one.get("title") for one in found.all("span") if one.get("title")]
    assert names[0] == f"runs/{'x' * 80}-0"  # what is cut is there in whole


def test_commits_are_links_only_if_they_can_be(swa: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        hub = {"repo": "me/model", "revision": "step1", "commit": "a" * 40, "path": "", "title": ""}
        content["checkpoints"][0]["hub"] = hub
        content["checkpoints"][1]["hub"] = hub | {"repo": 'me/"><script>'}
        content["checkpoints"][2]["hub"] = hub | {"commit": "javascript:alert(1)"}

    change(swa, edit)
    found = page(swa)
    (link,) = [one for one in found.all("a") if one.get("href").startswith("http")]
    assert link.get("href") == f"https://huggingface.co/me/model/tree/{'a' * 40}"
    assert found.table("Checkpoints").rows[0][-1] == "a" * 10


def test_the_recipe_is_one_and_the_command_to_verify_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter_with_module(tmp_path, monkeypatch, "code_of_a_report")
    save_run(tmp_path / "runs")
    names = ["--model", "code_of_a_report:Net", "--data", "code_of_a_report:batches"]
    assert run(["average", "runs/step*.safetensors", "-o", "swa", "--quiet", *names]) == 0
    found = page(Path("swa"))
    command, recipe, verify = (one.text for one in found.all("pre"))
    assert command == told(Path("swa"))["command"]
    recorded = {
        key: value
        for key, value in told(Path("swa"))["reproduce"].items()
        if key not in ("member", "torch_threads", "obstacles")
    }
    assert tomllib.loads(recipe) == recorded
    assert verify == "ckptavg verify swa --reproduce --trust-code"
    Path("swa/recipe.toml").write_text(recipe)
    assert run(["run", "swa/recipe.toml", "-o", "again", "--quiet"]) == 0
    name = "model.safetensors"
    assert Path("again", name).read_bytes() == Path("swa", name).read_bytes()


def test_obstacles_are_told_instead(swa: Path) -> None:
    change(swa, lambda content: content["reproduce"].update(obstacles=["data is a lambda"]))
    found = page(swa)
    assert "Data is a lambda." in [one.text for one in found.all("li")]
    assert found.all("pre")[-1].text == f"ckptavg verify {swa}"


def test_numbers_that_are_not_finite_are_shown(swa: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["metrics"] = {"loss": None, "accuracy": float("nan"), "score": float("-inf")}
        content["comparison"] = []
        content["batchnorm"]["layers"][0].update(mean_shift=None, variance_ratio=[0.0, None])

    change(swa, edit)
    found = page(swa)
    assert found.table("Evaluation").rows == [["this model", "not finite", "NaN", "−inf"]]  # noqa: RUF001 - a minus sign
    layer = found.table("BatchNorm layers").rows[0]
    assert layer[2:] == ["not finite", "0 to not finite"]


def test_a_provenance_of_an_older_build_is_enough(swa: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        for key in ("statistic", "reproduce", "versions", "metrics", "comparison", "adapter"):
            del content[key]
        del content["output"]["files"], content["output"]["evidence"]

    change(swa, edit)
    assert page(swa).headings == [
        "swa", "Notes", "Checkpoints", "Tensors", "BatchNorm", "Provenance",
    ]  # fmt: skip


# ---- what is foreign


def hostile(value: Any, key: str = "") -> Any:
    """Return a value with hostile text wherever there may be any, also as keys."""
    if isinstance(value, dict):
        foreign = ("metrics", "skipped", "tied", "derived", "averaged_dtypes", "versions")
        made = {name: hostile(one, name) for name, one in value.items()}
        return {f"{HOSTILE}{name}": one for name, one in made.items()} if key in foreign else made
    if isinstance(value, list):
        return [hostile(one) for one in value]
    return f"{HOSTILE}{value}" if isinstance(value, str) and key not in ("kind", "mode") else value


def test_nothing_in_a_file_becomes_markup(swa: Path) -> None:
    save_evidence(swa, **{key: hostile(["x"]) for key in ("summary", "notes")}, title=HOSTILE)
    (swa / "plane.svg").write_bytes(SVG)
    content = told(swa)
    content["notes"] = ["x"]
    content["batchnorm"]["skipped"] = {"frozen": "is frozen"}
    content["tensors"]["tied"] = {"a": "b"}
    made = hostile(content)
    made["metrics"] = made["comparison"][-1]["metrics"]
    (swa / "ckptavg.json").write_text(json.dumps(made))
    clean = len(Document("<p></p>").elements)
    found = page(swa)  # which has no script
    text = write_report(swa, overwrite=True).path.read_text()
    assert clean == 1
    assert SHOWN in found.one("body").text
    assert "<script" not in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", text)


def test_hostile_searches_are_text_too(tmp_path: Path) -> None:
    found = sweep(
        save_run(tmp_path / "runs"), tmp_path / "best", schemes=["uniform:last=1..3"],
        evaluation=JUDGED, metric="loss",
    )  # fmt: skip
    path = tmp_path / "best/sweep.json"
    content = json.loads(path.read_text())
    for row in content["rows"]:
        row["name"] = f"{HOSTILE}{row['name']}"
    content["command"] = HOSTILE
    path.write_text(json.dumps(content))
    assert found.best
    text = page(tmp_path / "best").one("body").text
    assert SHOWN in text


@pytest.mark.promise(11)
def test_tokens_are_blanked_out(swa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "Ab1" * 10
    monkeypatch.setenv("HF_TOKEN", "another-secret")
    save_evidence(swa, summary=[f"with {token}"])
    change(swa, lambda content: content.update(notes=[f"sent {token} and another-secret"]))
    text = write_report(swa).path.read_text()
    assert "hf_***" in text
    assert token not in text
    assert "another-secret" not in text


def test_a_name_in_the_other_direction_stays_within_itself(swa: Path) -> None:
    change(swa, lambda content: content.update(notes=["שלום עולם"]))
    assert "שלום עולם" in page(swa).one("body").text  # letters are no danger
    assert "unicode-bidi: isolate" in STYLE


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ('{"format_version": 2}', "is of format version 2, expected 1"),
        ('{"format_version": 1}', "makes no sense"),
    ],
)
def test_a_provenance_that_cannot_be_read_is_one_line(
    swa: Path, content: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (swa / "ckptavg.json").write_text(content)
    assert run(["report", str(swa)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{swa}/ckptavg.json: {reason}" in line
    assert not (swa / "report.html").exists()


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["batchnorm"].update(layers=5),
        lambda content: content["checkpoints"][0].update(coefficient="1"),
        lambda content: content["checkpoints"][0].update(coefficient=10**400),
        lambda content: content.update(metrics=["loss"]),
        lambda content: content.update(notes=3),
        lambda content: content["tensors"].update(averaged_dtypes=None),
        lambda content: content["output"].update(shards=None),
        lambda content: content.update(reproduce=[1]),
        lambda content: content["checkpoints"].clear(),
    ],
)
def test_a_provenance_of_other_types_makes_no_sense(swa: Path, edit: Any) -> None:
    change(swa, edit)
    with pytest.raises(ReportError, match="makes no sense"):
        write_report(swa)


@pytest.mark.parametrize(
    ("metrics", "last", "words"),
    [
        ({"loss": 2.0}, {"loss": 2.0}, "as good as the last checkpoint"),
        ({"loss": 2.0}, {"loss": 1.5}, "0.5 worse than the last checkpoint (1.5)"),
        ({"accuracy": 2.0}, {"accuracy": 1.5}, "0.5 better than the last checkpoint (1.5)"),
        ({"mean": 2.0}, {"mean": 1.5}, "+0.5 against the last checkpoint (1.5)"),
        ({"loss": 2.0}, {"loss": None}, "last checkpoint: not finite"),
        ({"loss": 2.0}, {"other": 1.0}, ""),
    ],
)
def test_what_averaging_brought_is_told(
    swa: Path, metrics: dict[str, float], last: dict[str, Any], words: str
) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["metrics"] = metrics
        content["comparison"] = [{"name": "last checkpoint", "metrics": last}]

    change(swa, edit)
    main = next(one for one in page(swa).elements if one.get("class") == "tile main")
    assert main.text == f"{next(iter(metrics))}2{words}"


def test_how_the_pass_ran_is_told(swa: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["batchnorm"].update(
            n_samples=12000, n_batches=9, n_processes=4, options={"channels_last": True},
            estimator="paper", convergence={"share": 0.125, "change": 0.0123},
            skipped={"head.bn": "is frozen"}, notes=["the loader is slow"],
        )  # fmt: skip

    change(swa, edit)
    text = page(swa).one("body").text
    assert (
        "1 layer recomputed: 12,000 samples in 9 batches, estimator “paper”, 4 processes, "
        "channels last True. The last 12% of the data moved no mean by more than 0.012 sd and no "
        "variance by more than 1.23%."
    ) in text
    assert "head.bn is frozen" in text
    assert "The loader is slow." in text


def test_an_average_of_averages_says_so(tmp_path: Path) -> None:
    sources = save_run(tmp_path / "runs")
    average_checkpoints(sources[:2], tmp_path / "early")
    average_checkpoints(sources[2:], tmp_path / "late")
    average_checkpoints([tmp_path / "early", tmp_path / "late"], tmp_path / "both")
    rows = page(tmp_path / "both").table("Checkpoints").rows
    assert [row[-1] for row in rows] == ["uniform of 2 checkpoints"] * 2
    average_checkpoints([tmp_path / "early", sources[3]], tmp_path / "mixed")
    rows = page(tmp_path / "mixed").table("Checkpoints").rows
    assert sorted(row[-1] for row in rows) == ["", "uniform of 2 checkpoints"]
    average_checkpoints([tmp_path / "early"], tmp_path / "again")
    assert "An average that was made before" in page(tmp_path / "again").one("header").text


def test_copied_tensors_that_differ_are_named_apart(swa: Path) -> None:
    change(swa, lambda content: content["tensors"]["copied"].append("steps"))
    facts = [one.text for one in page(swa).elements if one.get("class") == "fact"]
    assert "1 tensor: bn.num_batches_tracked" in facts
    assert any(one.startswith("of which differ1, taken from ") for one in facts)


def test_a_recipe_that_toml_cannot_express_is_left_out(swa: Path) -> None:
    change(swa, lambda content: content["reproduce"].update(sources=["\ud800"]))
    assert "ckptavg verify" not in page(swa).one("body").text


def test_what_cannot_be_listed_or_read_is_an_error(
    swa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_evidence(swa)
    (swa / "plane.svg").write_bytes(SVG)

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert write_report(swa).notes == (
            f"{swa}/plane.svg: cannot be read: permission denied, so it is left out",
        )
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ReportError, match="cannot be listed: permission denied"):
        write_report(swa, overwrite=True)


@pytest.mark.parametrize(("nbytes", "text"), [(999, "999 B"), (12345, "12.3 kB"), (3e14, "300 TB")])
def test_sizes_have_three_digits(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


# ---- several models


def test_several_averages_have_one_page(tmp_path: Path) -> None:
    schemes = ["uniform", "late=uniform:last=2", "median"]
    average_checkpoints(
        save_run(tmp_path / "runs"), tmp_path / "all", schemes=schemes, batchnorm=COMPARED
    )
    (tmp_path / "all/notes").mkdir()
    found = page(tmp_path / "all")
    assert [one.text for one in found.all("h2")] == ["late", "median", "uniform"]
    assert [one.text for one in found.all("nav")] == ["Overviewlatemedianuniform"]
    overview = found.table("Averages")
    assert overview.header == ["", "scheme", "checkpoints", "BN statistics", "loss", "mean"]
    expected = [
        (name, told(tmp_path / "all" / name)["metrics"]) for name in ("late", "median", "uniform")
    ]
    assert [(row[0], *row[4:]) for row in overview.rows] == [
        (name, number(metrics["loss"]), number(metrics["mean"])) for name, metrics in expected
    ]
    assert [row[2] for row in overview.rows] == ["2", "4", "4"]


def test_of_many_averages_each_is_folded(tmp_path: Path) -> None:
    average_checkpoints(
        save_run(tmp_path / "runs"), tmp_path / "all", schemes=["uniform:last=1..4", "median"]
    )
    found = page(tmp_path / "all")
    assert [one.text for one in found.all("summary")].count(
        "Checkpoints, tensors and the rest"
    ) == 5


# ---- searches


def test_a_sweep_is_shown_with_its_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sources = save_run(tmp_path / "runs")
    sweep(
        sources, tmp_path / "best", schemes=["uniform:last=1..3"], evaluation=JUDGED,
        metric="loss", plot=True,
    )  # fmt: skip
    rows = json.loads((tmp_path / "best/sweep.json").read_text())["rows"]
    found = page(tmp_path / "best")
    assert found.table("Averages").rows == [
        [row["name"], str(row["n_checkpoints"]), number(row["metrics"]["loss"]),
         number(row["metrics"]["mean"])]
        for row in rows
        if row["kind"] == "average"
    ]  # fmt: skip
    assert found.table("Averages").out == [0]
    assert len(found.table("Single checkpoints").rows) == 8
    (image,) = found.all("img")
    assert image.get("src").startswith("data:image/png;base64,")
    assert "Of 3 averages, uniform-last3 is best by loss (lower is better): 3." in image.get("alt")
    # rows of the sweep are not told twice
    names = [row[0] for row in found.table("Evaluation").rows]
    assert names[0] == "uniform-last3"
    assert "uniform-last1" not in names


def test_a_soup_is_shown_step_by_step(tmp_path: Path) -> None:
    greedy_soup(save_run(tmp_path / "runs"), tmp_path / "soup", evaluation=JUDGED, metric="loss")
    steps = json.loads((tmp_path / "soup/soup.json").read_text())["steps"]
    found = page(tmp_path / "soup")
    table = found.table("Steps")
    assert [row[1:] for row in table.rows] == [
        ["accepted" if step["accepted"] else "rejected", number(step["metrics"]["loss"]),
         number(step["mean_metrics"]["loss"])]
        for step in steps
    ]  # fmt: skip
    assert table.out == [at for at, step in enumerate(steps) if step["accepted"]]
    assert "1 of 4 checkpoints went in, by loss (lower is better): 1, against 1" in (
        found.one("body").text
    )


def test_trials_are_shown_best_first_and_many_are_folded(swa: Path) -> None:
    trials = [{"coefficients": [1.0], "metrics": {"loss": (n * 7) % 30}} for n in range(30)]
    content = {"format_version": 1, "metric": "loss", "mode": "min", "trials": trials}
    (swa / "tune.json").write_text(json.dumps(content | {"command": None}))
    found = page(swa)
    assert [row[1] for row in found.table("Trials").rows] == [str(n) for n in range(30)]
    (swa / "soup.json").write_text(json.dumps(content | {"mode": "up"}))
    with pytest.raises(ReportError, match=r"soup\.json: makes no sense"):
        write_report(swa, overwrite=True)
    best = found.table("Trials, best").rows
    assert best[0] == ["trial 1, the uniform mean", "0"]
    assert len(best) == 10
    assert "All 30 trials" in [one.text for one in found.all("summary")]


def test_a_search_that_came_along_with_a_checkpoint_is_not_this_models(swa: Path) -> None:
    (swa / "sweep.json").write_text('{"format_version": 1}')
    change(swa, lambda content: content["output"].update(side_files=["sweep.json"]))
    assert "Sweep" not in page(swa).headings
    change(swa, lambda content: content["output"].update(evidence=["sweep.json"]))
    with pytest.raises(ReportError, match=r"sweep\.json: makes no sense"):
        write_report(swa, overwrite=True)


# ---- measurements


def test_measurements_are_found_and_stand_in_order(swa: Path, tmp_path: Path) -> None:
    save_evidence(swa / "b", "width")
    save_evidence(swa, "plane")
    save_evidence(tmp_path / "far", "trajectory", name="mine")
    save_evidence(tmp_path / "far", "trajectory")
    ensemble = save_evidence(tmp_path / "other", "ensemble")
    (swa / "plane-notes.json").write_text('{"mine": 1}')  # of somebody else
    given = [tmp_path / "far/mine.json", tmp_path / "far", swa / "b", ensemble]
    result = write_report(swa, given)
    assert result.evidence == (
        tmp_path / "far/mine.json", tmp_path / "far/trajectory.json", swa / "plane.json",
        swa / "b/width.json", ensemble,
    )  # fmt: skip
    assert result.sections[-7:-1] == (
        "Evaluation", "Trajectory", "Trajectory", "Plane", "Width", "Ensemble",
    )  # fmt: skip
    found = page(swa, given)
    text = found.one("body").text
    assert text.count("the plane") == 1
    assert "The first thing." in text
    assert "How it was done." in text
    assert "ckptavg plane runs" in text
    assert "All figures: b/width.json, width.csv" in text
    assert f"All figures: {ensemble}, ensemble.csv" in text


def test_pictures_are_put_in_svg_before_png(swa: Path) -> None:
    save_evidence(swa / "plane")
    save_evidence(swa / "plane", name="plane-2")
    for name in ("plane-loss.svg", "plane-loss.png", "plane-error.png", "plane-2-loss.svg"):
        (swa / "plane" / name).write_bytes(SVG if name.endswith("svg") else PNG)
    (swa / "plane/other.png").write_bytes(PNG)
    result = write_report(swa)
    assert result.n_pictures == 3
    assert not result.notes
    found = page(swa)
    assert [one.get("src").partition(";")[0] for one in found.all("img")] == [
        "data:image/svg+xml", "data:image/png", "data:image/svg+xml",
    ]  # fmt: skip
    assert [one.text for one in found.all("figcaption")] == [
        "Loss plane-2-loss.svg", "Error plane-error.png", "Loss plane-loss.svg",
    ]  # fmt: skip
    assert found.all("img")[1].get("alt") == (
        "the plane: error. The first thing. The second thing."
    )


def test_pictures_that_cannot_be_taken_are_told(
    swa: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ckptavg.report.pictures.MAX_PICTURE_BYTES", 1000)
    save_evidence(swa / "plane")
    for name, content in (("a.png", SVG), ("b.svg", PNG), ("c.svg", SVG + b" " * 1000)):
        (swa / "plane" / f"plane-{name}").write_bytes(content)
    assert run(["report", str(swa)]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert [note.rpartition("/")[2] for note in notes] == [
        "plane-a.png: is no PNG image, so it is left out",
        "plane-b.svg: is no SVG image, so it is left out",
        "plane-c.svg: has 1.09 kB, more than the 1 kB that are taken, so it is left out",
    ]
    found = page(swa)
    assert not found.all("img")
    missing = [one.text for one in found.elements if one.get("class") == "missing"]
    assert missing[0] == "The picture plane-a.png is no PNG image."


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not valid JSON"),
        ('{"kind": "plane", "format_version": 9}', "is of format version 9"),
        ('{"kind": "plane", "format_version": 1}', "makes no sense"),
        ('{"kind": "plane", "format_version": 1, "title": 1}', "makes no sense"),
    ],
)
def test_evidence_that_cannot_be_read_is_an_error(swa: Path, content: str, reason: str) -> None:
    (swa / "plane.json").write_text(content)
    with pytest.raises(ReportError, match=rf"plane\.json: {reason}"):
        write_report(swa)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "is not there"),
        (lambda path: path.mkdir(), "holds no evidence: nothing that sweep, soup, tune"),
        (lambda path: path.write_text("{}"), "holds no evidence"),
        (lambda path: path.write_text('{"format_version": 1, "kind": []}'), "holds no evidence"),
    ],
)
def test_evidence_that_is_named_must_be_there(
    swa: Path, tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    make(tmp_path / "given")
    with pytest.raises(ReportError, match=f"given: {reason}"):
        write_report(swa, [tmp_path / "given"])


def test_an_output_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="nowhere: is not there"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ReportError, match="file: is not a directory"):
        write_report(tmp_path / "file")
    with pytest.raises(ReportError, match=r"holds no ckptavg\.json"):
        write_report(tmp_path)


# ---- the file


def test_only_a_report_is_replaced(swa: Path, tmp_path: Path) -> None:
    first = write_report(swa).path
    assert first == swa / "report.html"
    before = first.read_bytes()
    with pytest.raises(OutputError, match=r"report\.html: is there already; pass --overwrite"):
        write_report(swa)
    change(swa, lambda content: content.update(notes=["something new"]))
    assert write_report(swa, overwrite=True).path.read_bytes() != before
    page_of_mine = tmp_path / "mine.html"
    page_of_mine.write_text("<p>my own</p>")
    for other in (page_of_mine, swa / "model.safetensors", tmp_path):
        with pytest.raises(OutputError, match="is no report of ckptavg's, so it is not replaced"):
            write_report(swa, path=other, overwrite=True)
    link = tmp_path / "link.html"
    link.symlink_to(first)
    with pytest.raises(OutputError, match="is no report"):
        write_report(swa, path=link, overwrite=True)
    assert page_of_mine.read_text() == "<p>my own</p>"
    with pytest.raises(OutputError, match=r"no/page\.html: .*/no is not a directory"):
        write_report(swa, path=tmp_path / "no/page.html")


def test_equal_outputs_have_equal_pages(swa: Path, tmp_path: Path) -> None:
    pages = [write_report(swa, path=tmp_path / f"{n}.html").path.read_bytes() for n in range(2)]
    assert pages[0] == pages[1]


def test_a_page_that_cannot_be_written_leaves_nothing(
    swa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(swa)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="cannot be written: no space left on device"):
        write_report(swa)
    assert tree(swa) == before


def test_a_file_that_appears_meanwhile_is_kept(swa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def appear(descriptor: int) -> None:
        (swa / "report.html").write_text("mine")
        real(descriptor)

    monkeypatch.setattr("os.fsync", appear)
    with pytest.raises(OutputError, match="appeared while it was being written"):
        write_report(swa)
    assert (swa / "report.html").read_text() == "mine"
    assert not list(swa.glob("report.html.partial-*"))


def test_a_file_system_without_such_a_rename_will_do(
    swa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path, flags: int) -> None:
        raise OSError(errno.EINVAL, "no flags")

    monkeypatch.setattr("ckptavg.staging.rename", refuse)
    assert write_report(swa).path.exists()


def test_a_report_does_not_stand_in_the_way_of_other_commands(tmp_path: Path) -> None:
    sources = save_run(tmp_path / "runs")
    folder = tmp_path / "model"
    for path in sources:
        (folder / path.stem).mkdir(parents=True)
        path.rename(folder / path.stem / "model.safetensors")
    sources = sorted(folder.iterdir())
    output = tmp_path / "swa"
    average_checkpoints(sources, output)
    write_report(output)
    verified = verify_output(output)
    assert verified.ok
    assert verified.notes == verified.unlisted == ()
    assert not is_report(output / "missing.html")
    average_checkpoints(sources, output, overwrite=True)
    assert not (output / "report.html").exists()  # it was about the other one
    write_report(output)
    average_checkpoints([output, sources[0]], tmp_path / "both")
    assert not (tmp_path / "both/report.html").exists()
    average_checkpoints([sources[0], output], tmp_path / "both", overwrite=True)
    assert not (tmp_path / "both/report.html").exists()
    (output / "report.html").write_text("<p>my own</p>")
    assert verify_output(output).unlisted == ("report.html",)
    with pytest.raises(OutputError, match=r"also holds 'report\.html'"):
        average_checkpoints(sources, output, overwrite=True)


def test_a_report_on_several_may_be_replaced_with_them(tmp_path: Path) -> None:
    sources = save_run(tmp_path / "runs")
    average_checkpoints(sources, tmp_path / "all", schemes=["uniform", "median"])
    write_report(tmp_path / "all")
    average_checkpoints(sources, tmp_path / "all", schemes=["uniform", "median"], overwrite=True)
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["median", "uniform"]


# ---- the command


def test_the_command_says_what_it_wrote(
    swa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_evidence(swa / "plane")
    (swa / "plane/plane.svg").write_bytes(SVG)
    assert run(["report", str(swa), "-o", str(tmp_path / "page.html")]) == 0
    nbytes = (tmp_path / "page.html").stat().st_size
    assert capsys.readouterr().out == (
        f"{tmp_path}/page.html: 8 sections, 1 picture, {nbytes / 1000:.3g} kB\n"
        "  Summary, Notes, Checkpoints, Tensors, BatchNorm, Evaluation, Plane, Provenance\n"
    )
    assert not (swa / "report.html").exists()


def test_the_command_tells_programs_and_refuses_with_codes(
    swa: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(swa), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == {
        "output": str(swa),
        "report": str(swa / "report.html"),
        "sections": [
            "Summary", "Notes", "Checkpoints", "Tensors", "BatchNorm", "Evaluation", "Provenance",
        ],
        "models": [str(swa)],
        "evidence": [],
        "n_pictures": 0,
        "nbytes": (swa / "report.html").stat().st_size,
        "notes": [],
    }  # fmt: skip
    assert run(["report", str(swa)]) == 1
    assert "pass --overwrite to replace a report" in capsys.readouterr().err
    assert run(["report", str(swa), "--overwrite", "--quiet"]) == 0
    assert run(["report"]) == 2


# ---- how it looks


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_told_apart_in_light_and_dark() -> None:
    schemes = [dict(re.findall(r"--(\w+): (#\w{6});", part)) for part in STYLE.split("@media")[:2]]
    for colours in schemes:
        for ground in ("ground", "raised", "tint"):
            for text in ("text", "quiet", "accent"):
                assert contrast(colours[text], colours[ground]) >= 4.5  # WCAG AA, text
        for bar in ("bar", "minus"):
            assert contrast(colours[bar], colours["ground"]) >= 3  # WCAG AA, pictures


def test_the_page_fetches_nothing() -> None:
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    assert "</" not in STYLE


@pytest.mark.parametrize(
    ("labels", "prefix", "short"),
    [
        (["runs/a/1.pt", "runs/a/2.pt"], "runs/a/", ["1.pt", "2.pt"]),
        (["me/m@step1", "me/m@step2"], "me/m@", ["step1", "step2"]),
        (["runs/a", "runs/ab"], "runs/", ["a", "ab"]),
        (["a/same", "a/same"], "a/", ["same", "same"]),
        (["one", "two"], "", ["one", "two"]),
        (["runs/1/", "runs/1/"], "runs/", ["1/", "1/"]),
    ],
)
def test_labels_lose_what_all_begin_with(labels: list[str], prefix: str, short: list[str]) -> None:
    assert short_labels(labels) == (prefix, short)
