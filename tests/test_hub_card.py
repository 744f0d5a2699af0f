"""The card says where a model came from, and nothing foreign can break it or speak through it."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_fixtures import REPO, ckptavg, save_steps, upload
from loopback_hub import LoopbackHub
from safetensors.torch import save_file
from torch import nn

from ckptavg import BnPass, average_checkpoints, push_model, recompute_bn
from ckptavg.hub.card import model_card

# huggingface_hub uploads files with a deprecated argument of its HTTP client
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

yaml: Any = pytest.importorskip("yaml")  # comes with huggingface_hub, and has no types

TARGET = "tester/swa"
TAGS = ["merge", "checkpoint-averaging", "ckptavg"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def told(checkpoints: Sequence[Mapping[str, Any]], **others: Any) -> dict[str, Any]:
    """Return what a ``ckptavg.json`` tells, as far as a card is made of it."""
    return {
        "ckptavg_version": "1.2.3",
        "scheme": "uniform",
        "checkpoints": list(checkpoints),
        "recipe": {"accumulate": "auto", "dtype": "same", "buffers": "last"},
        "tensors": {"averaged": 3, "averaged_dtypes": {"float32": 3}, "copied": []},
        **others,
    }


def checkpoint(source: str = "a.pt", repo: str | None = None, **others: Any) -> dict[str, Any]:
    """Return what a ``ckptavg.json`` tells of one checkpoint, here or on the Hub."""
    hub = repo and {"repo": repo, "revision": "step1", "commit": COMMIT, "path": "", "title": ""}
    return {"source": source, "hub": hub, "step": None, "coefficient": 0.5, **others}


def matter(card: str) -> dict[str, Any]:
    """Return the front matter as the Hub reads it."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match is not None
    found: dict[str, Any] = yaml.safe_load(match[1])
    return found


def matter_of(inherited: str | None = None, **others: Any) -> dict[str, Any]:
    """Return the front matter of a card made from one local checkpoint, its tags left out."""
    content = told([checkpoint()], inherited_card=inherited)
    found = matter(model_card(content, TARGET, **{"has_config": False, **others}))
    assert found["tags"][-3:] == TAGS
    found["tags"] = found["tags"][:-3]
    return {name: value for name, value in found.items() if value}


def rows(card: str) -> list[str]:
    """Return the lines of the table of checkpoints."""
    return [line for line in card.splitlines() if line.startswith("|")][2:]


def pushed_card(hub: LoopbackHub, directory: Path, **options: Any) -> str:
    """Push a directory, and return the card that is on the hub then."""
    push_model(directory, TARGET, **options)
    return hub.files(TARGET)["README.md"].decode()


# where it came from


def test_a_card_names_commits_steps_and_coefficients(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path
) -> None:
    average_checkpoints(
        [f"{REPO}@step1", f"{REPO}@step2", steps[2]], tmp_path / "out", coefficients=(0.5, 0.2, 0.3)
    )
    card = pushed_card(hub, tmp_path / "out")
    branches = hub.branches(REPO)
    local = str(steps[2]).replace("_", "\\_")
    assert rows(card) == [
        f"| {REPO}@step1 | `{branches['step1']}` | 1 | 0.5 |",
        f"| {REPO}@step2 | `{branches['step2']}` | 2 | 0.2 |",
        f"| {local} |  | 10 | 0.3 |",
    ]
    assert matter(card) == {
        "license": "mit", "base_model": REPO, "base_model_relation": "merge", "tags": TAGS,
    }  # fmt: skip
    assert "# swa\n" in card
    assert "scheme `coefficients:0.5,0.2,0.3`" in card


def test_several_repositories_are_listed_once_each() -> None:
    names = ["org/b", "org/a", "org/b", "org/c"]
    card = model_card(told([checkpoint(repo=name) for name in names]), TARGET, has_config=False)
    assert matter(card)["base_model"] == ["org/b", "org/a", "org/c"]
    assert matter(card)["base_model_relation"] == "merge"


def test_local_checkpoints_have_no_base(hub: LoopbackHub, tmp_path: Path) -> None:
    average_checkpoints(save_steps(tmp_path / "local"), tmp_path / "out")
    assert matter(pushed_card(hub, tmp_path / "out")) == {"license": "mit", "tags": TAGS}


def test_an_average_of_averages_names_the_first_repositories(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path
) -> None:
    average_checkpoints([f"{REPO}@step1", f"{REPO}@step2"], tmp_path / "first")
    average_checkpoints([tmp_path / "first", steps[2]], tmp_path / "second")
    average_checkpoints([tmp_path / "second", tmp_path / "first"], tmp_path / "third")
    card = pushed_card(hub, tmp_path / "third")
    assert matter(card)["base_model"] == REPO
    assert len(rows(card)) == 2


def test_new_statistics_of_an_average_keep_its_base(hub: LoopbackHub, tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"step{step}").mkdir()
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        save_file(model.state_dict(), tmp_path / f"step{step}" / "model.safetensors")
        upload(hub, tmp_path / f"step{step}")
    average_checkpoints(f"{REPO}@step*", tmp_path / "swa")
    batchnorm = BnPass(
        model=lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)),
        batches=lambda: [torch.ones(4, 2), torch.zeros(2, 2)],
        evaluate=lambda model: {"loss_*": 0.25, "diverged": float("nan")},
    )
    recompute_bn(tmp_path / "swa", tmp_path / "out", batchnorm)
    card = pushed_card(hub, tmp_path / "out")
    assert matter(card)["base_model"] == REPO
    assert "- BatchNorm statistics of 1 layers recomputed over 6 samples (2 batches)\n" in card
    assert "- loss\\_\\*: 0.25\n- diverged: not finite\n" in card


def test_what_an_average_tells_of_itself_may_be_nonsense() -> None:
    deep: Any = checkpoint(repo="org/deep")
    for _ in range(5000):
        deep = {"made_by_ckptavg": {"checkpoints": [deep]}}
    nonsense = [
        5, "text", [], {}, {"checkpoints": 5}, {"checkpoints": [None, 1, "x", []]},
        {"checkpoints": [{"hub": {"repo": "<script>"}}, {"hub": {"repo": "a/b\nc: d"}}]},
        {"checkpoints": [{"hub": {}}, {"hub": 3}]}, deep["made_by_ckptavg"],
    ]  # fmt: skip
    checkpoints = [checkpoint(made_by_ckptavg=one) for one in nonsense]
    card = model_card(told(checkpoints), TARGET, has_config=False)
    assert matter(card)["base_model"] == "org/deep"
    assert len(rows(card)) == len(nonsense)


# what it inherits


def test_a_card_inherits_what_still_holds() -> None:
    inherited = (
        "license: other\nlicense_name: olmo\nlicense_link: https://example.org/l\n"
        "language:\n- en\n- de\ndatasets: [org/data]\npipeline_tag: text-generation\n"
        "library_name: timm\ntags: [pythia, merge, pythia]\nmetrics: [accuracy]\n"
        "model-index: 3\nwidget:\n- text: hi\nbase_model: org/before\nextra_gated_prompt: no\n"
    )
    content = told([checkpoint(repo="org/model")], inherited_card=inherited)
    found = matter(model_card(content, TARGET, has_config=True))
    assert found == {
        "license": "other", "license_name": "olmo", "license_link": "https://example.org/l",
        "language": ["en", "de"], "datasets": ["org/data"], "pipeline_tag": "text-generation",
        "library_name": "timm", "base_model": "org/model", "base_model_relation": "merge",
        "tags": ["pythia", "merge", "checkpoint-averaging", "ckptavg"],
    }  # fmt: skip


def test_local_checkpoints_pass_on_what_they_were_made_from() -> None:
    assert matter_of("base_model: gpt2") == {"base_model": "gpt2"}
    assert matter_of("base_model: [org/a, /home/me/model, org/b]") == {
        "base_model": ["org/a", "org/b"]
    }


@pytest.mark.parametrize(
    "inherited",
    [
        "license: [",
        "- a list",
        "just text",
        "",
        "self: 1\nlicense: mit",
        "3: 4\nlicense: mit",
        "license: !!python/object/apply:os.system ['exit 1']",
        "language: &a [*a]\nlicense: {a: 1}\ndatasets: [[1]]\ntags: {a: 1}\nbase_model: 3",
        "a: &a [x, x]\nb: &b [*a, *a]\nlanguage: [*b, *b]",
        "language: no\npipeline_tag: 2020-01-01\nlibrary_name: .nan",
        "language: " + "[" * 3000,
        "base_model: ../../etc\ntags: ''",
    ],
)
def test_a_broken_card_passes_nothing_on(
    inherited: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert matter_of(inherited) == {}
    assert capsys.readouterr() == ("", "")


def test_text_that_looks_like_the_end_stays_inside_its_value() -> None:
    inherited = 'license_name: "a\\n---\\nlicense: mit"\npipeline_tag: "x: [&a"'
    assert matter_of(inherited) == {
        "license_name": "a\n---\nlicense: mit", "pipeline_tag": "x: [&a",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["---\nlicense: [\n---\n", "no front matter", "---\n", "\x00\xff"])
def test_a_model_with_a_broken_card_is_averaged_and_pushed(
    hub: LoopbackHub, tmp_path: Path, text: str
) -> None:
    saved = save_steps(tmp_path / "local", (1, 2))
    for directory in saved:
        (directory / "README.md").write_bytes(text.encode("latin-1"))
        upload(hub, directory)
    average_checkpoints(f"{REPO}@step*", tmp_path / "out")
    assert matter(pushed_card(hub, tmp_path / "out")) == {
        "base_model": REPO, "base_model_relation": "merge", "tags": TAGS,
    }  # fmt: skip


def test_only_a_config_with_a_model_type_is_for_transformers(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    average_checkpoints(save_steps(tmp_path / "local", (1, 2)), tmp_path / "out")
    assert "library_name" not in matter(pushed_card(hub, tmp_path / "out"))
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    assert matter(pushed_card(hub, tmp_path / "out"))["library_name"] == "transformers"
    (tmp_path / "out" / "config.json").unlink()
    assert "library_name" not in matter(pushed_card(hub, tmp_path / "out"))


# what it shows


HOSTILE = "a|b`c\n| x | y |\r\u2028<script>[l](http://x)*_\\|\x1b[31m#"


def test_a_name_stays_in_its_cell() -> None:
    card = model_card(
        told(
            [checkpoint(HOSTILE), checkpoint()],
            scheme=HOSTILE, command=f"ckptavg average '{HOSTILE}```'", metrics={HOSTILE: 1.0},
        ),
        TARGET,
        has_config=False,
    )  # fmt: skip
    assert len(rows(card)) == 2
    cells = re.split(r"(?<!\\)\|", rows(card)[0].replace("\\\\", ""))
    assert [cell.strip() for cell in cells[2:]] == ["", "", "0.5", ""]
    assert re.search(r"(?<!\\)[<\[`*_]", cells[1].replace("\\\\", "")) is None
    assert "\x1b" not in card
    assert card.count("```") == 2
    assert card.count("\n- ") == 3 + len(TAGS)


def test_a_long_table_is_cut() -> None:
    card = model_card(told([checkpoint(f"{n}.pt") for n in range(203)]), TARGET, has_config=False)
    assert len(rows(card)) == 201
    assert rows(card)[-1] == "| and 3 more: see ckptavg.json | | | |"
    assert "The weighted mean of 203 checkpoints" in card


def test_own_text_comes_last() -> None:
    card = model_card(told([checkpoint()]), TARGET, has_config=False, own_text="\n## Mine\n\n")
    assert card.endswith("\n\n## Mine\n")


@pytest.mark.promise(11)
def test_the_command_is_shown_without_a_token(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "hf_AbCdEfGhIjKlMnOpQrStUvWxYz").mkdir()
    output = tmp_path / "hf_AbCdEfGhIjKlMnOpQrStUvWxYz" / "out"
    arguments = ["average", f"{REPO}@step*", "-o", str(output), "--push", TARGET]
    monkeypatch.setattr("sys.argv", ["ckptavg", *arguments])
    assert ckptavg(capsys, *arguments)[0] == 0
    card = hub.files(TARGET)["README.md"].decode()
    command = f"ckptavg average '{REPO}@step*' -o {tmp_path}/hf_***/out --push {TARGET}"
    assert f"```sh\n{command}\n```\n" in card
    assert json.loads(hub.files(TARGET)["ckptavg.json"])["command"] == command


def test_versions_are_told(hub: LoopbackHub, steps: list[Path], tmp_path: Path) -> None:
    average_checkpoints(f"{REPO}@step*", tmp_path / "out")
    assert f"torch {torch.__version__}" in pushed_card(hub, tmp_path / "out")


# valid for the Hub


def test_the_hub_is_asked_whether_the_card_is_valid(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path
) -> None:
    average_checkpoints(steps, tmp_path / "out")
    push_model(tmp_path / "out", TARGET)
    lines = [f"{one.method} {one.path.partition('?')[0]}" for one in hub.requests]
    asked = lines.index("POST /api/validate-yaml")
    sent = [index for index, line in enumerate(lines) if line.startswith("PUT /upload/")]
    assert sent
    assert asked < min(sent)


def test_a_torch_file_is_not_for_transformers() -> None:
    """The card says how to load it instead."""
    for output_format, is_for_them in (("safetensors", True), ("torch", False)):
        content = told([checkpoint()], output={"format": output_format})
        card = model_card(content, TARGET, has_config=True)
        assert ("library_name" in matter(card)) == is_for_them
        assert ("## How to load it" in card) != is_for_them
