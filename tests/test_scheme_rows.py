"""Schemes as they are typed, their windows, and what they tell; through the engine, too."""

import json
import math
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint
from safetensors.torch import load_file
from test_adapters import make
from test_schemes import NAMES
from torch import nn

from ckptavg import (
    Scheme,
    Selection,
    UsageError,
    average_checkpoints,
    list_schemes,
    parse_scheme,
    parse_schemes,
)
from ckptavg.cli import run
from ckptavg.coefficients import CoefficientRow
from ckptavg.recipe import Accumulate
from ckptavg.schemes import Positions, coefficient_rows, output_names, shortened
from ckptavg.schemes.power_ema import fit_power_ema

# those that are linear, and what they have to work with: six checkpoints at STEPS
STEPS = (100, 150, 300, 310, 500, 800)
CONVEX = (
    "uniform",
    "linear",
    "ema:decay=0.7",
    "ema:step-decay=0.995",
    "power:sigma=0.1",
    "power:sigma=0.25",
    *(f"wsm:decay={name}" for name in ("linear", "cosine", "1-sqrt", "1-square")),
    "wsm:decay=inverse",
    "wsm:decay=exponential,final=0.01",
)
SIGNED = (
    "phema:sigma=0.15,stored=0.05/0.1/0.05/0.1/0.05/0.1",
    "phema:sigma=0.03,stored=0.1",
    "unaverage:counts=10/25,last=2",
    "unaverage:step-decay=0.999,last=2",
    "unaverage:decay=0.9,updates=3,first=2",
)
OTHERS = ("median", "trimmed:fraction=0.2", "swag:rank=3,samples=2,seed=1,scale=0.5")
WINDOWS: tuple[dict[str, int], ...] = (
    {},
    {"last": 3},
    {"first": 2},
    {"every": 2},
    {"every": 4, "last": 2},
    {"from_step": 150},
    {"to_step": 310},
    {"from_step": 101, "to_step": 799, "every": 3, "first": 1},
    {"from_step": 300, "to_step": 300},
)


def positions(
    steps: tuple[int | None, ...] = STEPS, epochs: tuple[int | None, ...] | None = None
) -> Positions:
    labels = tuple(f"ckpt-{step}" for step in steps)
    return Positions(labels, steps, epochs or (None,) * len(steps))


def row_of(scheme: Scheme | str, where: Positions | None = None) -> CoefficientRow:
    parsed = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    rows = coefficient_rows(parsed, positions() if where is None else where)
    assert [suffix for suffix, _ in rows] == list(parsed.suffixes)
    return rows[0][1]


def refusal(scheme: str, where: Positions | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        row_of(scheme, where)
    return str(caught.value)


@pytest.mark.parametrize("text", [*CONVEX, *SIGNED, *OTHERS, "coefficients:0,-0.5,1.5,0.1,1e-05"])
@pytest.mark.parametrize("window", ["", "last=3", "from=1,to=900,every=2,first=2"])
def test_what_is_shown_is_what_one_types(text: str, window: str) -> None:
    if text.startswith("coefficients") or "last" in text or "first" in text:
        window = ""
    whole = ("," if ":" in text else ":").join(filter(None, (text, window)))
    scheme = parse_scheme(whole)
    assert parse_scheme(str(scheme)) == scheme
    assert str(parse_scheme(str(scheme))) == str(scheme)
    assert eval(repr(scheme)) == scheme
    assert hash(eval(repr(scheme))) == hash(scheme)
    assert parse_scheme(f"my.label={scheme}").label == "my.label"


def test_schemes_are_made_in_python_under_the_same_names() -> None:
    assert Scheme(name="ema", decay=0.9, last=10) == parse_scheme("ema:decay=9/10,last=10")
    assert Scheme(from_step=5, to_step=9) == parse_scheme("uniform:from=5,to=9")
    assert str(Scheme(name="ema", step_decay=0.99)) == "ema:step-decay=0.99"
    assert str(Scheme(name="phema", sigma=0.1, stored=(0.05,))) == "phema:sigma=0.1,stored=0.05"
    torch_number = torch.tensor(3).item()
    assert Scheme(last=torch_number) == Scheme(last=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 0.5}, "scheme 'uniform': 'decay' is not an option of uniform; there are "
                         "from, to, every, last, first"),
        ({"name": "ema", "decay": "0.5"}, "scheme 'ema': decay is ''0.5'', expected a number above "
                                          "0 and below 1"),
        ({"last": 2.0}, "scheme 'uniform': last is '2.0', expected a whole number of at least 1"),
        ({"last": True}, "scheme 'uniform': last is 'True', expected a whole number of at least 1"),
        ({"name": "coefficients"}, "scheme 'coefficients': needs coefficients, for example "
                                   "coefficients:0.2,0.3,0.5"),
        ({"name": "coefficients", "coefficients": (1.0,), "last": 1},
         "scheme 'coefficients': 'last' is not an option of coefficients, which takes numbers "
         "alone"),
        ({"name": None}, f"scheme 'None' is not known; there are {NAMES}"),
    ],
)  # fmt: skip
def test_options_that_do_not_belong_are_refused_in_python(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        Scheme(**options)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_a_range_stands_for_a_scheme_each() -> None:
    assert parse_schemes("uniform:last=1..3") == tuple(Scheme(last=n) for n in (1, 2, 3))
    assert [one.last for one in parse_schemes("ema:decay=0.9,last=2..9..3")] == [2, 5, 8]
    assert [one.rank for one in parse_schemes("swag:rank=2..4,seed=1")] == [2, 3, 4]
    assert [one.from_step for one in parse_schemes("uniform:from=0..200..100")] == [0, 100, 200]
    assert [one.label for one in parse_schemes("k=uniform:last=1..2")] == ["k-1", "k-2"]
    assert parse_schemes("uniform:last=4..4") == (Scheme(last=4),)
    assert parse_schemes("uniform") == (Scheme(),)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_the_window_is_what_the_selection_takes(window: dict[str, int]) -> None:
    selection = Selection(
        last=window.get("last"),
        first=window.get("first"),
        every=window.get("every"),
        steps=(window.get("from_step"), window.get("to_step")),
    )
    labels = positions().labels
    taken = selection.chosen(STEPS, labels)
    assert list(row_of(Scheme(**window)).used) == taken  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "window"), list(product(CONVEX, [one for one in WINDOWS if one])))
def test_coefficients_are_those_of_the_window_alone(text: str, window: dict[str, int]) -> None:
    used = row_of(Scheme(**window)).used  # type: ignore[arg-type]
    typed = ",".join(f"{key.removesuffix('_step')}={value}" for key, value in window.items())
    found = row_of(f"{text}{',' if ':' in text else ':'}{typed}")
    alone = row_of(text, positions(tuple(STEPS[index] for index in used)))
    assert [found.multipliers[index] for index in used] == list(alone.multipliers)
    assert found.divisor == alone.divisor
    assert set(found.used) <= set(used)


@pytest.mark.parametrize("text", [*CONVEX, *SIGNED])
def test_coefficients_sum_to_one(text: str) -> None:
    for steps in (STEPS, tuple(range(1, 7)), (3, 1000, 10**6, 10**6 + 1, 10**9, 10**12)):
        row = row_of(text, positions(steps))
        assert math.fsum(row.multipliers) / row.divisor == pytest.approx(1, abs=1e-15)
        assert min(row.coefficients) >= 0 or text in SIGNED


def test_many_coefficients_sum_to_one_to_the_last_bit() -> None:
    generator = random.Random(0)
    for _ in range(200):
        n = generator.randint(2, 300)
        values = [generator.random() for _ in range(n)]
        total = sum(values)
        scheme = Scheme(name="coefficients", coefficients=tuple(v / total for v in values))
        row = row_of(scheme, positions(tuple(range(n))))
        assert abs(math.fsum(row.multipliers) - 1) <= 2**-53


def test_a_single_checkpoint_is_its_own_average() -> None:
    for text in (*CONVEX, "median", "trimmed:fraction=0.4", "phema:sigma=0.1,stored=0.1"):
        for step in (7, 0):
            if step == 0 and text.startswith("phema"):
                continue
            row = row_of(text, positions((step,)))
            assert (row.multipliers, row.divisor, row.statistic) == ((1.0,), 1, None)


def test_equal_coefficients_make_the_correctly_rounded_mean() -> None:
    for text in ("coefficients:1/6,1/6,1/6,1/6,1/6,1/6", "power:sigma=0.28867513459481287"):
        row = row_of(text, positions(tuple(range(10, 70, 10))))
        assert (row.multipliers, row.divisor) == ((1.0,) * 6, 6)
    assert row_of("wsm:decay=linear,last=2").multipliers == (0, 0, 0, 0, 1, 1)


def test_checkpoints_with_coefficient_zero_are_left_out() -> None:
    assert row_of("coefficients:0,0.5,0,0.25,0.25,0").used == (1, 3, 4)
    assert row_of("power:sigma=0.1", positions((0, 10, 20))).used == (1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform:last=7", "there are only 6 checkpoints"),
        ("uniform:from=300,first=5", "there are only 4 checkpoints"),
        ("uniform:from=501,to=799", "none of the 6 checkpoints is of these steps"),
        ("linear:to=120,last=2", "there is only 1 checkpoint"),
        ("unaverage:counts=1/2", "takes two checkpoints, an older and a newer average, not 6; "
                                 "last=2 takes the newest two"),
        ("swag:last=1", "takes at least 2 checkpoints: one has no spread"),
        ("swag:rank=4,last=3", "there are only 3 checkpoints, too few for rank=4"),
        ("phema:sigma=0.1", "the name of ckpt-100 does not tell the sigma of a stored average, as "
                            "in '...-0.050.pt'; say it with stored=, for example stored=0.05"),
    ],
)  # fmt: skip
def test_what_the_checkpoints_do_not_allow_is_refused(text: str, message: str) -> None:
    assert refusal(text) == f"scheme '{text}': {message}"


@pytest.mark.parametrize(
    "text",
    ["ema:step-decay=0.9", "power:sigma=0.1", "phema:sigma=0.1,stored=0.05", "uniform:from=1",
     "unaverage:step-decay=0.9,last=2"],
)  # fmt: skip
def test_a_checkpoint_without_a_step_is_named_where_steps_are_needed(text: str) -> None:
    unknown = positions((100, None, None))._replace(labels=("a", "b", "c"))
    assert refusal(text, unknown) == (
        f"scheme '{text}': neither the name nor the metadata of b tells a training step, which it "
        "needs"
    )


@pytest.mark.parametrize(
    "text",
    [
        "ema:step-decay=0.9",
        "power:sigma=0.1",
        "wsm:decay=linear",
        "unaverage:step-decay=0.9,last=2",
    ],
)
def test_steps_have_to_increase(text: str) -> None:
    same = positions((100, 200, 200))._replace(labels=("a", "b", "c"))
    assert refusal(text, same) == (
        f"scheme '{text}': b and c are both of step 200; leave one out"
    )  # fmt: skip
    back = positions((100, 300, 200))._replace(labels=("a", "b", "c"))
    assert refusal(text, back) == (
        f"scheme '{text}': c of step 200 comes after b of step 300; name them in the order of "
        "training"
    )


def test_power_and_wsm_go_by_epochs_where_steps_are_not_known() -> None:
    by_epoch = positions((None, 7, None), (2, 4, 8))
    notes: list[str] = []
    for text in ("power:sigma=0.1", "wsm:decay=cosine"):
        ((_, row),) = coefficient_rows(parse_scheme(text), by_epoch, notes)
        assert row == row_of(text, positions((2, 4, 8)))
    assert notes[0] == "scheme 'power:sigma=0.1' goes by epochs: not all training steps are known"
    from_zero = positions((None,) * 3, (0, 1, 2))
    assert row_of("power:sigma=0.1", from_zero) == row_of("power:sigma=0.1", positions((1, 2, 3)))
    assert "are both of epoch 1; leave one out" in refusal(
        "wsm:decay=linear", positions((None,) * 3, (0, 1, 1))
    )


def test_wsm_takes_unknown_positions_as_evenly_spaced() -> None:
    notes: list[str] = []
    unknown = positions((None,) * 4)
    ((_, row),) = coefficient_rows(parse_scheme("wsm:decay=linear"), unknown, notes)
    assert row == row_of("wsm:decay=linear", positions((1, 2, 3, 4)))
    assert notes == [
        "scheme 'wsm:decay=linear' takes the checkpoints as evenly spaced: their training steps "
        "are not known"
    ]


def test_what_a_user_should_know_of_coefficients_is_noted() -> None:
    def notes(text: str) -> list[str]:
        found: list[str] = []
        coefficient_rows(parse_scheme(text), positions(), found)
        return found

    assert notes("unaverage:counts=1/3,last=2") == [
        "scheme 'unaverage:counts=1/3,last=2' has negative coefficients (smallest -0.5 for "
        "ckpt-500): it extrapolates"
    ]
    assert notes("power:sigma=0.2,from=300,to=310") == [
        "scheme 'power:sigma=0.2,from=300,to=310' gives 91% of the weight to ckpt-300, which "
        "stands for all training before it"
    ]
    assert "gives 95% of the weight to ckpt-100" in notes("ema:decay=0.99")[0]
    assert [notes(text) for text in ("uniform", "linear", "median", "swag:rank=2")] == [[]] * 4


NAMED = (
    ("net-0000100-0.050.pt", 0.05),
    ("ema_sigma=0.1-step-250.safetensors", 0.1),
    ("run/sigma_rel-0.15/model.safetensors", 0.15),
    ("snap-std.28-epoch-0.3.pt", 0.28),
    ("v2.0.1-0.125.pt", 0.125),
)


@pytest.mark.parametrize(("label", "sigma"), NAMED)
def test_names_of_stored_averages_tell_their_sigma(label: str, sigma: float) -> None:
    where = Positions((label, "other-0.200.pt"), (100, 200), (None, None))
    assert row_of("phema:sigma=0.11", where) == row_of(
        f"phema:sigma=0.11,stored={sigma}/0.2", where
    )


@pytest.mark.parametrize(
    ("label", "numbers"),
    [("net-0.05-0.1.pt", "0.05, 0.1"), ("loss-0.35.pt", "0.35"), ("sigma-0.000.pt", "0")],
)
def test_a_name_that_does_not_tell_one_sigma_is_refused(label: str, numbers: str) -> None:
    where = Positions((f"run/{label}",), (100,), (None,))
    assert refusal("phema:sigma=0.1", where) == (
        f"scheme 'phema:sigma=0.1': the name of run/{label} does not tell one sigma of a stored "
        f"average (at most 0.2887), but {numbers}; say it with stored=, for example stored=0.05"
    )


def test_stored_sigmas_follow_their_checkpoints() -> None:
    scheme = parse_scheme("phema:sigma=0.1,stored=0.05/0.1/0.2")
    assert scheme.reordered([2, 0, 1]).stored == (0.2, 0.05, 0.1)
    one_for_all = parse_scheme("phema:sigma=0.1,stored=0.05")
    assert one_for_all.reordered([2, 0, 1]) == one_for_all
    assert refusal(str(scheme)) == "3 values of stored for 6 checkpoints"
    # windows count in the order of steps, whatever the order of the profiles
    where = positions((100, 200, 300, 100, 200, 300))
    typed = "phema:sigma=0.07,stored=0.05/0.05/0.05/0.1/0.1/0.1,last=4"
    assert row_of(typed, where).used == (1, 2, 4, 5)
    assert "is of step 0, where no average is" in refusal(
        "phema:sigma=0.1,stored=0.05", positions((0, 10))
    )


def test_outputs_are_called_after_what_is_typed() -> None:
    texts = (
        "ema:decay=0.9,last=10", "wsm:decay=1-sqrt", "unaverage:counts=100/200", "swag:samples=2",
        "phema:sigma=0.1,stored=0.05/0.1", "phema:sigma=0.1,stored=0.05/0.2", "s=swag:samples=1",
        "uniform:from=100,to=900",
    )  # fmt: skip
    assert output_names([parse_scheme(text) for text in texts]) == (
        "ema-decay0.9-last10", "wsm-decay1-sqrt", "unaverage-counts100-200",
        "swag-samples2-sample-01", "swag-samples2-sample-02", "phema-sigma0.1", "phema-sigma0.1-2",
        "s-sample-01", "uniform-from100-to900",
    )  # fmt: skip
    assert output_names([parse_scheme("swag:samples=2")]) == ("sample-01", "sample-02")
    assert output_names([parse_scheme("swag:samples=1")]) == ("",)
    assert output_names([parse_scheme("swag:samples=100")])[::99] == ("sample-001", "sample-100")


def test_long_schemes_are_shortened_in_messages() -> None:
    assert shortened("uniform:last=5") == "uniform:last=5"
    long = f"coefficients:{','.join(['0.0125'] * 80)}"
    assert shortened(long) == "coefficients:0.0125,0.0125,0.0...5,0.0125,0.0125"


def saved(folder: Path, *, equal: bool = False) -> list[Path]:
    """Save five checkpoints of several dtypes."""
    paths = []
    for number, step in enumerate((100, 150, 300, 310, 500)):
        generator = torch.Generator().manual_seed(0 if equal else number)
        tensors = {
            "a": torch.randn(301, generator=generator),
            "b": torch.randn(301, generator=generator).bfloat16(),
            "c": torch.randn(31, generator=generator).double(),
        }
        paths.append(save_checkpoint(folder / f"ckpt-{step}", tensors, "safetensors"))
    return paths


LINEAR = (
    *CONVEX, "phema:sigma=0.15,stored=0.05/0.1/0.05/0.1/0.05", *SIGNED[2:],
    "coefficients:0.1,0.2,0.3,0.15,0.25",
)  # fmt: skip


def test_equal_checkpoints_return_themselves_under_every_linear_scheme(tmp_path: Path) -> None:
    sources = saved(tmp_path, equal=True)
    expected = load_file(sources[0])
    choices: tuple[Accumulate, ...] = ("auto", "float32")
    for accumulate in choices:
        result = average_checkpoints(
            sources, tmp_path / accumulate, schemes=LINEAR, accumulate=accumulate
        )
        assert len(result.outputs) == len(LINEAR)
        for one in result.outputs:
            found = load_file(one.path / "model.safetensors")
            for name, value in expected.items():
                assert torch.equal(found[name], value), (one.scheme, name)


def test_every_linear_scheme_is_the_combination_it_tells(tmp_path: Path) -> None:
    sources = saved(tmp_path)
    result = average_checkpoints(sources, tmp_path / "out", schemes=LINEAR)
    inputs = [load_file(source) for source in sources]
    for one in result.outputs:
        found = load_file(one.path / "model.safetensors")
        for name in ("a", "c"):
            expected = sum(
                (coefficient or 0) * tensors[name].double()
                for coefficient, tensors in zip(one.coefficients, inputs, strict=True)
            )
            assert isinstance(expected, torch.Tensor)
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-6)
        told = json.loads((one.path / "ckptavg.json").read_text())
        assert told["scheme"] == one.scheme
        assert told["statistic"] is None


def test_the_order_of_the_sources_does_not_matter_where_steps_are_known(tmp_path: Path) -> None:
    sources = saved(tmp_path)
    schemes = [*CONVEX, *SIGNED[2:], "median:last=3"]
    sigmas = [0.05, 0.1, 0.05, 0.1, 0.05]
    files = []
    for number, order in enumerate(([0, 1, 2, 3, 4], [3, 0, 4, 2, 1])):
        stored = "/".join(str(sigmas[index]) for index in order)
        result = average_checkpoints(
            [sources[index] for index in order],
            tmp_path / str(number),
            schemes=[*schemes, f"phema:sigma=0.15,stored={stored}"],
        )
        files.append(
            [load_file(one.path / "model.safetensors") for one in result.outputs]
        )  # fmt: skip
    for one, other in zip(*files, strict=True):
        assert all(torch.equal(other[name], value) for name, value in one.items())


def test_stored_averages_of_two_widths_are_put_together(tmp_path: Path) -> None:
    steps, sigmas = (100, 200, 300), (0.05, 0.1)
    tensors = {}
    for number, (step, sigma) in enumerate(product(steps, sigmas)):
        name = f"network-snapshot-{step:07d}-{sigma:.3f}"
        tensors[name] = torch.randn(5, generator=torch.Generator().manual_seed(number))
        save_checkpoint(tmp_path / name, {"w": tensors[name]}, "safetensors")
    result = average_checkpoints(
        tmp_path / "*.safetensors", tmp_path / "out", schemes="phema:sigma=0.15"
    )
    fit = fit_power_ema([100, 100, 200, 200, 300, 300], sigmas * 3, 0.15)
    labels = [f"network-snapshot-{step:07d}-{sigma:.3f}" for step, sigma in product(steps, sigmas)]
    expected = sum(
        value * tensors[label].double()
        for value, label in zip(fit.coefficients, labels, strict=True)
    )
    assert isinstance(expected, torch.Tensor)
    found = load_file(tmp_path / "out/model.safetensors")["w"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert any("with a relative error of 0.15 (L2)" in note for note in result.notes)


def test_what_has_no_coefficients_says_so_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path())
    arguments = ["average", "ckpt-*.safetensors", "-o", "out"]
    for text in ("median:last=3", "trimmed:fraction=0.2", "swag:samples=1"):
        arguments += ["--scheme", text]
    assert run([*arguments, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = "  checkpoint            step  epoch  median-last3  trimmed-fraction0.2"
    assert lines[1].startswith(header)
    assert lines[2].split()[3:5] == ["0", "trimmed"]
    assert lines[6].split()[3:6] == ["median", "trimmed", "20%"]
    assert "swag-samples1-sample-01: noise of 0.707 sd (seed 0, sample 1) is added" in lines
    assert run([*arguments, "--dry-run", "--json"]) == 0
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert outputs[0]["coefficients"] == [0, 0, None, None, None]
    assert [one["statistic"] for one in outputs] == [
        "median", "trimmed 20%", "noise of 0.707 sd (seed 0, sample 1)"
    ]  # fmt: skip
    assert run([*arguments, "--json"]) == 0
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert outputs[1]["coefficients"] == [None] * 5
    assert outputs[1]["statistic"] == "trimmed 20%"
    told = json.loads(Path("out/median-last3/ckptavg.json").read_text())
    assert [one["coefficient"] for one in told["checkpoints"]] == [None] * 3
    assert told["statistic"] == {"name": "median", "n_cut": 1}
    told = json.loads(Path("out/swag-samples1-sample-01/ckptavg.json").read_text())
    assert told["statistic"]["sample"] == 1
    assert math.fsum(one["coefficient"] for one in told["checkpoints"]) == pytest.approx(1)


def test_coefficients_are_told_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in range(1, 9):
        save_checkpoint(Path(f"step{step}"), {"w": torch.ones(2) * step}, "safetensors")
    arguments = ["average", "step{1..8}.safetensors", "-o", "out", "--scheme", "linear"]
    arguments += [
        "--scheme",
        "end=uniform:last=2",
        "--scheme",
        "median",
        "--scheme",
        "ema:decay=0.5,last=3",
    ]
    arguments += ["--scheme", "swag:samples=1,rank=2,last=2", "--scheme", "uniform:last=1"]
    assert run(arguments) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "coefficients: " in line]
    ends = "(step7.safetensors to step8.safetensors)"
    assert told[:4] == [
        "coefficients: linear: 0.02778, 0.05556, 0.08333, ..., 0.1667, 0.1944, 0.2222 of "
        "8 checkpoints (step1.safetensors to step8.safetensors)",
        f"coefficients: end (uniform:last=2): 0.5 each of 2 checkpoints {ends}",
        "coefficients: median: median of 8 checkpoints (step1.safetensors to step8.safetensors)",
        "coefficients: ema-decay0.5-last3 (ema:decay=0.5,last=3): 0.25, 0.25, 0.5 of 3 checkpoints "
        "(step6.safetensors to step8.safetensors)",
    ]
    assert told[4].endswith(f"of 2 checkpoints {ends}, plus noise of 0.707 sd (seed 0, sample 1)")
    assert told[5].endswith("(uniform:last=1): 1 of 1 checkpoint (step8.safetensors)")
    for silence in ("--quiet", "--json"):
        assert run([*arguments, "--overwrite", silence]) == 0
        assert "coefficients: " not in capsys.readouterr().err


def test_the_plan_is_told_before_anything_is_read(tmp_path: Path) -> None:
    seen: list[object] = []
    average_checkpoints(
        saved(tmp_path),
        tmp_path / "out",
        planned=lambda plan: seen.append(plan.labels),
        progress=lambda *done: seen.append(done),
    )
    assert isinstance(seen[0], tuple)
    assert len(seen[0]) == 5
    assert all(one != seen[0] for one in seen[1:])
    assert len(seen) > 1


def test_all_schemes_are_explained_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["average", "--list-schemes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    for kind, (first, second) in zip(
        list_schemes(), zip(lines[::2], lines[1::2], strict=True), strict=False
    ):
        assert first == f"{kind.name:<13}{kind.summary}"
        assert second.endswith(f"e.g. {kind.example}")
        assert parse_scheme(kind.example).name == kind.name
        for option in kind.options:
            assert f"{option.key}=" in kind.usage or kind.positional


def test_normed_layers_and_adapters_refuse_what_is_no_weighted_mean(tmp_path: Path) -> None:
    sources, adapters = [], make(tmp_path, [{}, {}, {}])[0]
    for step in (1, 2, 3):
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        state = {f"layer.{name}": value for name, value in layer.state_dict().items()}
        sources.append(save_checkpoint(tmp_path / f"step-{step}", state, "safetensors"))
    for scheme in ("median", "trimmed:fraction=1/3", "swag:samples=1"):
        with pytest.raises(UsageError) as caught:
            average_checkpoints(sources, tmp_path / "out", schemes=["uniform", scheme])
        assert str(caught.value) == (
            f"scheme '{parse_scheme(scheme)}': works on single values, but the weight_norm layer "
            "'layer.parametrizations.weight' is averaged by the weight it stands for; take a "
            "weighted mean such as uniform"
        )
    average_checkpoints(sources, tmp_path / "out", schemes=["linear", "median:last=1"])
    kinds: tuple[dict[str, Any], ...] = ({}, {"adapter_rank": 2}, {"adapter_factors": True})
    for options in kinds:
        with pytest.raises(UsageError, match="LoRA adapters are averaged by the products of"):
            average_checkpoints(adapters, tmp_path / "adapter", schemes="median", **options)
