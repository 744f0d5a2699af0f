"""Many averages from one read: each is what a run of its own would have made."""

import json
from pathlib import Path

import pytest
import torch
from conftest import FORMATS, save_checkpoint, tree
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ckptavg import (
    BnPass,
    IncompatibleCheckpointsError,
    OutputError,
    Scheme,
    UsageError,
    average_checkpoints,
    parse_scheme,
)
from ckptavg.average.sums import running_sums
from ckptavg.cli import run
from ckptavg.coefficients import CoefficientRow
from ckptavg.schemes import Positions, coefficient_rows, output_names

SCHEMES = (
    "uniform",
    "uniform:last=3",
    "uniform:last=1",
    "uniform:first=2",
    "coefficients:0.1,0.2,0.3,0,0.4",
    "tail=coefficients:0,0,0,1/3,2/3",
)
NAMES = "uniform, linear, ema, power, wsm, coefficients, phema, unaverage, median, trimmed, swag"
WINDOW = "there are from, to, every, last, first"
ONE = "expected a whole number of at least 1"
FORMS = "takes counts=M/N, or step-decay=B, or decay=D with updates=U"
NO_LABEL = "cannot name an output: use letters, digits, '_', '-', '.' and '+'"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def coefficient_row(scheme: Scheme, n_checkpoints: int) -> CoefficientRow:
    unknown = (None,) * n_checkpoints
    labels = tuple(f"number {number}" for number in range(n_checkpoints))
    ((_, row),) = coefficient_rows(scheme, Positions(labels, unknown, unknown))
    return row


def checkpoints(
    folder: Path, dtype: torch.dtype = torch.float32, count: int = 5, layout: str = ""
) -> list[Path]:
    generator = torch.Generator().manual_seed(1)
    paths = []
    for step in range(1, count + 1):
        tensors = {
            "a": torch.randn(301, 7, generator=generator).to(dtype),
            "b": torch.randn(5, generator=generator).to(dtype),
            "seen": torch.tensor([step // 2, 7]),
            "same": torch.arange(3),
        }
        name = folder / f"step-{step}"
        paths.append(save_checkpoint(name, tensors, layout or FORMATS[step % len(FORMATS)]))
    return paths


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("uniform", Scheme()),
        ("uniform:last=5", Scheme(last=5)),
        ("uniform:first=12", Scheme(first=12)),
        ("late=uniform:last=5", Scheme(last=5, label="late")),
        ("v1.2_x+y-z=uniform", Scheme(label="v1.2_x+y-z")),
        (
            "coefficients:0.2, 3/10,0.5",
            Scheme(name="coefficients", coefficients=(0.2, 0.3, 0.5)),
        ),
        (
            "mix=coefficients:0.2,0.8",
            Scheme(name="coefficients", coefficients=(0.2, 0.8), label="mix"),
        ),
    ],
)
def test_schemes_are_read_as_they_are_typed(text: str, scheme: Scheme) -> None:
    assert parse_scheme(text) == scheme


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"scheme '' is not known; there are {NAMES}"),
        ("emma:decay=0.9", "scheme 'emma' is not known; did you mean ema?"),
        ("uniform:", f"scheme 'uniform:': '' is not an option of uniform; {WINDOW}"),
        ("uniform:last", f"scheme 'uniform:last': last is '', {ONE}"),
        ("uniform:las=3", "scheme 'uniform:las=3': 'las' is not an option of uniform; "
                          "did you mean last?"),
        ("uniform:last=x", f"scheme 'uniform:last=x': last is 'x', {ONE}"),
        ("uniform:last=-1", f"scheme 'uniform:last=-1': last is '-1', {ONE}"),
        ("uniform:last=0", f"scheme 'uniform': last is '0', {ONE}"),
        ("uniform:last=1,last=2", "scheme 'uniform:last=1,last=2': last is given twice"),
        ("uniform:last=1,first=2", "scheme 'uniform': takes last or first, not both"),
        ("uniform:from=9,to=2", "scheme 'uniform': the step of from= is after that of to="),
        ("uniform:last=5..2", f"scheme 'uniform:last=5..2': last is '5..2', {ONE}"),
        ("uniform:last=1..9..0", f"scheme 'uniform:last=1..9..0': last is '1..9..0', {ONE}"),
        ("uniform:last=1..2000", "scheme 'uniform:last=1..2000': last stands for 2000 schemes"),
        ("uniform:last=1..3", "scheme 'uniform:last=1..3': stands for 3 schemes, expected one"),
        ("uniform:last=1..2,every=1..2",
         "scheme 'uniform:last=1..2,every=1..2': only one option may have a range"),
        ("ema", "scheme 'ema': takes decay=D (over snapshots) or step-decay=B (per training step)"),
        ("ema:decay=0.9,step-decay=0.9",
         "scheme 'ema': takes decay=D (over snapshots) or step-decay=B (per training step)"),
        ("ema=decay=0.9",
         "scheme 'ema=decay=0.9': options stand after ':', as in ema:decay=0.9"),
        ("ema=x=uniform:last=3",
         "scheme 'ema=x=uniform:last=3': 'ema' is a scheme and cannot be a label"),
        ("ema:decay=1", "scheme 'ema': decay is '1', expected a number above 0 and below 1"),
        ("ema:decay=nan", "scheme 'ema:decay=nan': decay is 'nan', "
                          "expected a number above 0 and below 1"),
        ("ema:decay=0.9..1", "scheme 'ema:decay=0.9..1': decay is '0.9..1', "
                             "expected a number above 0 and below 1"),
        ("power", "scheme 'power': needs sigma, for example power:sigma=0.1"),
        ("power:sigma=0.29", "scheme 'power': sigma is '0.29', "
                             "expected a number above 0 and at most 0.288675"),
        ("wsm", "scheme 'wsm': needs decay, for example wsm:decay=cosine"),
        ("wsm:decay=cos", "scheme 'wsm': decay is 'cos', expected one of linear, cosine, 1-sqrt, "
                          "1-square, inverse, exponential"),
        ("wsm:decay=inverse,final=0",
         "scheme 'wsm': final must be above 0: decay=inverse never ends at 0"),
        ("wsm:decay=linear,final=1",
         "scheme 'wsm': final is '1', expected a number of at least 0 and below 1"),
        ("trimmed:fraction=0.5",
         "scheme 'trimmed': fraction is '0.5', expected a number of at least 0 and below 0.5"),
        ("phema:sigma=0.1,stored=0.05/0.4",
         "scheme 'phema': stored is '0.05/0.4', expected a list such as 0.05 or 0.05/0.1, each a "
         "number above 0 and at most 0.288675"),
        ("unaverage", f"scheme 'unaverage': {FORMS}"),
        ("unaverage:decay=0.9", f"scheme 'unaverage': {FORMS}"),
        ("unaverage:counts=1/2,updates=3", f"scheme 'unaverage': {FORMS}"),
        ("unaverage:counts=2/2", "scheme 'unaverage': counts=M/N: the newer average, N, has to be "
                                 "of more than M iterates"),
        ("unaverage:counts=5", "scheme 'unaverage': counts is '5', expected a list such as "
                               "100/200, each a whole number of at least 1"),
        ("swag:rank=1", "scheme 'swag': rank is '1', expected a whole number of at least 2"),
        ("swag:samples=1001",
         "scheme 'swag': samples is '1001', expected a whole number from 1 to 1000"),
        ("swag:scale=0", "scheme 'swag': scale is '0', expected a number above 0"),
        ("coefficients", "'' is not a list of numbers such as 0.2,0.3,0.5"),
        ("coefficients:a", "'a' is not a list of numbers such as 0.2,0.3,0.5"),
        ("coefficients:1/0", "'1/0' is not a list of numbers such as 0.2,0.3,0.5"),
        ("coefficients:nan", "'nan' is not a list of numbers such as 0.2,0.3,0.5"),
        ("coefficients:1,last=2", "'1,last=2' is not a list of numbers such as 0.2,0.3,0.5"),
        ("=uniform", "scheme '=uniform': nothing stands before '='"),
        ("../up=uniform", f"'../up' {NO_LABEL}"),
        (".hidden=uniform", f"'.hidden' {NO_LABEL}"),
        ("a b=uniform", f"'a b' {NO_LABEL}"),
    ],
)  # fmt: skip
def test_what_is_no_scheme_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_scheme(text)
    assert str(caught.value) == message


def test_uniform_takes_the_last_or_the_first() -> None:
    assert coefficient_row(Scheme(last=2), 5) == CoefficientRow((0, 0, 0, 1, 1), 2)
    assert coefficient_row(Scheme(first=2), 5) == CoefficientRow((1, 1, 0, 0, 0), 2)
    assert coefficient_row(Scheme(last=5), 5) == coefficient_row(Scheme(), 5)
    with pytest.raises(UsageError) as caught:
        coefficient_row(Scheme(last=6), 5)
    assert str(caught.value) == "scheme 'uniform:last=6': there are only 5 checkpoints"


def test_outputs_are_called_by_label_or_scheme() -> None:
    schemes = ["uniform", "uniform:last=5", "coefficients:1", "coefficients:1,0", "x=uniform"]
    assert output_names([parse_scheme(text) for text in schemes]) == (
        "uniform", "uniform-last5", "coefficients", "coefficients-2", "x",
    )  # fmt: skip
    assert output_names([parse_scheme("x=uniform")]) == ("",)


@pytest.mark.parametrize(
    "schemes", [("uniform", "uniform"), ("a=uniform", "A=uniform:last=1"), ("a=uniform",) * 2]
)
def test_two_outputs_of_one_name_are_refused(schemes: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="two outputs would be called '[aA]|uniform'; name them"):
        output_names([parse_scheme(text) for text in schemes])


def test_averages_of_the_last_checkpoints_share_one_sum() -> None:
    rows = [coefficient_row(parse_scheme(text), 5) for text in SCHEMES]
    sums = running_sums(rows)
    assert [list(one.multipliers) for one in sums] == [
        [4, 3, 2, 1, 0], [4, 2, 1, 0], [1, 0], [4, 3],
    ]  # fmt: skip
    assert sums[0].complete == {0: (0,), 2: (1,), 4: (2,)}
    assert [one.goes_on for one in sums] == [True, False, False, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("accumulate", ["auto", "float32", "float64"])
def test_each_output_equals_a_run_of_its_own(
    tmp_path: Path, dtype: torch.dtype, accumulate: str, device: str
) -> None:
    sources = checkpoints(tmp_path, dtype)
    result = average_checkpoints(
        sources,
        tmp_path / "all",
        schemes=SCHEMES,
        device=device,
        accumulate=accumulate,  # type: ignore[arg-type]
    )
    assert [one.path.name for one in result.outputs] == [
        "uniform", "uniform-last3", "uniform-last1", "uniform-first2", "coefficients", "tail",
    ]  # fmt: skip
    assert result.written_nbytes == len(SCHEMES) * sum(
        tensor.nbytes for tensor in load_file(tmp_path / "all/tail/model.safetensors").values()
    )
    for scheme, one in zip(SCHEMES, result.outputs, strict=True):
        alone = tmp_path / f"alone-{one.path.name}"
        single = average_checkpoints(sources, alone, schemes=scheme, accumulate=accumulate)  # type: ignore[arg-type]
        assert single.outputs[0].path == alone
        assert (alone / "model.safetensors").read_bytes() == (
            one.path / "model.safetensors"
        ).read_bytes(), scheme
        assert single.outputs[0].differing == one.differing
        assert single.outputs[0].taken_from == one.taken_from
        assert single.outputs[0].coefficients == one.coefficients


def test_the_mean_of_the_last_is_that_of_those_alone(tmp_path: Path, device: str) -> None:
    sources = checkpoints(tmp_path, torch.bfloat16)
    average_checkpoints(
        sources, tmp_path / "all", schemes=["uniform:last=2", "uniform:first=3"], device=device
    )
    for name, part in (("uniform-last2", sources[-2:]), ("uniform-first3", sources[:3])):
        average_checkpoints(part, tmp_path / name)
        expected = load_file(tmp_path / name / "model.safetensors")
        found = load_file(tmp_path / "all" / name / "model.safetensors")
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_integers_come_from_each_outputs_own_checkpoints(tmp_path: Path, device: str) -> None:
    sources = checkpoints(tmp_path)  # seen: 0, 1, 1, 2, 2
    schemes = ["uniform", "uniform:last=2", "uniform:first=2", "mid=coefficients:0,1/2,1/2,0,0"]
    result = average_checkpoints(sources, tmp_path / "out", schemes=schemes, device=device)
    seen = [load_file(one.path / "model.safetensors")["seen"].tolist()[0] for one in result.outputs]
    assert seen == [2, 2, 1, 1]
    assert [one.differing for one in result.outputs] == [("seen",), (), ("seen",), ()]
    taken = [Path(one.taken_from).name.partition(".")[0] for one in result.outputs]
    assert taken == ["step-5", "step-5", "step-2", "step-3"]
    first = average_checkpoints(
        sources, tmp_path / "first", schemes=schemes, buffers="first", device=device
    )
    seen = [load_file(one.path / "model.safetensors")["seen"].tolist()[0] for one in first.outputs]
    assert seen == [0, 2, 0, 1]
    with pytest.raises(IncompatibleCheckpointsError, match=r"'seen' of int64 differs between .*"):
        average_checkpoints(sources, tmp_path / "x", schemes=schemes[1:3], buffers="refuse")
    average_checkpoints(
        sources, tmp_path / "x", schemes=[schemes[1], schemes[3]], buffers="refuse", device=device
    )


def test_each_output_tells_how_it_was_made(tmp_path: Path) -> None:
    sources = checkpoints(tmp_path, layout="safetensors")
    average_checkpoints(
        sources, tmp_path / "out", schemes=["uniform", "late=uniform:last=2"], dtype="bfloat16"
    )
    told = json.loads((tmp_path / "out/late/ckptavg.json").read_text())
    assert told["scheme"] == "uniform:last=2"
    assert [(one["step"], one["coefficient"]) for one in told["checkpoints"]] == [
        (4, 0.5), (5, 0.5),
    ]  # fmt: skip
    assert told["n_sources"] == 5
    assert told["output"]["siblings"] == ["late", "uniform"]
    assert told["recipe"]["dtype"] == "bfloat16"
    with safe_open(tmp_path / "out/late/model.safetensors", "pt") as file:
        assert file.metadata()["ckptavg_scheme"] == "uniform:last=2"
        assert file.metadata()["ckptavg_steps"] == "4,5"
        assert file.metadata()["ckptavg_checkpoints"] == "2"
    alone = average_checkpoints(sources, tmp_path / "alone", schemes=["uniform:last=2"])
    assert any(note == "3 of the 5 checkpoints go into no average" for note in alone.notes)
    assert json.loads((tmp_path / "alone/ckptavg.json").read_text())["output"]["siblings"] == []


def test_checkpoints_that_go_nowhere_are_not_read(tmp_path: Path) -> None:
    sources = checkpoints(tmp_path, layout="safetensors")
    done: list[int] = []
    result = average_checkpoints(
        sources,
        tmp_path / "out",
        schemes=["uniform:last=2", "uniform:last=1"],
        progress=lambda stage, amount, total: done.append(amount),
    )
    one = (301 * 7 + 5) * 4 + 5 * 8
    assert result.read_nbytes == sum(done) == 2 * one


def test_non_finite_values_in_one_output_name_its_checkpoint(tmp_path: Path, device: str) -> None:
    sources = []
    for step in range(1, 5):
        values = torch.ones(10)
        values[3] = float("nan") if step == 1 else step
        sources.append(save_checkpoint(tmp_path / f"step-{step}", {"w": values}, "safetensors"))
    with pytest.raises(IncompatibleCheckpointsError, match="step-1.*tensor 'w' in checkpoint 1"):
        average_checkpoints(
            sources, tmp_path / "out", schemes=["uniform:last=3", "uniform"], device=device
        )
    average_checkpoints(
        sources, tmp_path / "out", schemes=["uniform:last=3", "uniform:last=2"], device=device
    )
    assert load_file(tmp_path / "out/uniform-last3/model.safetensors")["w"][3] == 3


def test_several_outputs_are_replaced_together_and_nothing_else_is(tmp_path: Path) -> None:
    sources = checkpoints(tmp_path)
    out = tmp_path / "out"
    average_checkpoints(sources, out, schemes=["uniform", "uniform:last=2"])
    average_checkpoints(sources, out, schemes=["a=uniform", "b=uniform:last=3"], overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["a", "b"]
    (out / "a" / "mine.txt").write_text("keep me")
    before = tree(out)
    with pytest.raises(OutputError, match=r"also holds 'mine.txt'"):
        average_checkpoints(sources, out, overwrite=True)
    (out / "a" / "mine.txt").rename(out / "mine.txt")
    with pytest.raises(OutputError, match=r"also holds 'a'"):
        average_checkpoints(sources, out, overwrite=True)
    (out / "mine.txt").unlink()
    average_checkpoints(sources, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["ckptavg.json", "model.safetensors"]
    assert sorted(before) == [
        "a/ckptavg.json", "a/mine.txt", "a/model.safetensors", "b/ckptavg.json",
        "b/model.safetensors",
    ]  # fmt: skip


def test_averages_that_were_collected_by_hand_are_not_replaced(tmp_path: Path) -> None:
    sources = checkpoints(tmp_path)
    for name in ("one", "two"):
        average_checkpoints(sources, tmp_path / "mine" / name)
    with pytest.raises(OutputError, match="also holds 'one'"):
        average_checkpoints(sources, tmp_path / "mine", overwrite=True)


def test_failure_leaves_none_of_the_outputs(tmp_path: Path) -> None:
    sources = checkpoints(tmp_path)

    def fail(stage: str, done: int, total: int | None) -> None:
        raise OSError("of the caller")

    with pytest.raises(OSError, match="of the caller"):
        average_checkpoints(
            sources, tmp_path / "out", schemes=["uniform", "uniform:last=2"], progress=fail
        )
    assert not list(tmp_path.glob("out*"))


def _bn_sources(folder: Path) -> tuple[list[Path], nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    paths = []
    for step in range(1, 4):
        with torch.no_grad():
            next(model.parameters()).add_(step)
        paths.append(
            save_checkpoint(folder / f"step-{step}", dict(model.state_dict()), "safetensors")
        )
    return paths, model


def test_each_output_gets_its_own_statistics(tmp_path: Path) -> None:
    sources, model = _bn_sources(tmp_path)
    data = [torch.randn(64, 3, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    schemes = ["uniform", "uniform:last=1", "uniform:first=2"]
    result = average_checkpoints(
        sources, tmp_path / "out", schemes=schemes, batchnorm=BnPass(model=model, batches=data)
    )
    for scheme, one in zip(schemes, result.outputs, strict=True):
        assert one.batchnorm is not None
        assert one.batchnorm.n_samples == 128
        alone = tmp_path / one.path.name
        average_checkpoints(
            sources, alone, schemes=[scheme], batchnorm=BnPass(model=model, batches=data)
        )
        assert (alone / "model.safetensors").read_bytes() == (
            one.path / "model.safetensors"
        ).read_bytes()
        weights = load_file(one.path / "model.safetensors")
        mean = (torch.cat(data) @ weights["0.weight"].T + weights["0.bias"]).mean(0)
        assert torch.allclose(weights["1.running_mean"], mean, atol=1e-5)


def test_data_that_ends_is_refused_for_several_outputs(tmp_path: Path) -> None:
    sources, model = _bn_sources(tmp_path)
    data = (torch.randn(64, 3) for _ in range(2))
    with pytest.raises(UsageError, match="the data is a generator, which can be gone through only"):
        average_checkpoints(
            sources,
            tmp_path / "out",
            schemes=["uniform", "uniform:last=1"],
            batchnorm=BnPass(model=model, batches=data),
        )
    assert not (tmp_path / "out").exists()


def test_coefficients_and_schemes_exclude_each_other(tmp_path: Path) -> None:
    sources = checkpoints(tmp_path)
    with pytest.raises(UsageError, match="pass coefficients or schemes"):
        average_checkpoints(sources, tmp_path / "out", schemes="uniform", coefficients=[1.0] * 5)


def test_command_line_makes_several_averages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints(tmp_path, layout="safetensors")
    arguments = ["average", "step-{1..5}.safetensors", "-o", "out"]
    arguments += ["--scheme", "uniform:last=2", "--scheme", "mix=coefficients:0,0,0,0.25,0.75"]
    assert run([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "would average 5 checkpoints (2 averages) into out" in shown
    assert "uniform-last2   mix" in shown
    assert run([*arguments, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in planned["outputs"]] == ["uniform-last2", "mix"]
    assert planned["outputs"][1]["coefficients"] == [0, 0, 0, 0.25, 0.75]
    assert run(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "out: 2 averages of 5 checkpoints"
    assert "  out/uniform-last2: uniform:last=2, 2 checkpoints" in lines
    assert "  out/mix: coefficients:0,0,0,0.25,0.75, 2 checkpoints" in lines
    assert run([*arguments, "--overwrite", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["path"] for one in told["outputs"]] == ["out/uniform-last2", "out/mix"]
    assert run(["average", "step-1.safetensors", "-o", "x", "--scheme", "medium"]) == 2
    assert "scheme 'medium' is not known; did you mean median?" in capsys.readouterr().err
