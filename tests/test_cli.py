"""The command line as a user meets it: whole outputs, exit codes, signals, speed of --help."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import torch
from conftest import save_checkpoint, tree
from run_fixtures import final_model, trainer_run
from safetensors.torch import load_file

from ckptavg.cli import _COMMANDS, cli, exit_code_of, run
from ckptavg.cli.progress import ProgressBars
from ckptavg.errors import AfterPublishError, CkptavgError, UsageError

MODEL = """
import torch
from torch import nn

def build(width=4):
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))

batches = [torch.arange(60.0).reshape(20, 3), torch.ones(5, 3)]

def broken():
    yield torch.ones(5, 3)
    raise ValueError("the disk of the data is on fire")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with three checkpoints of a small model, and its code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in list(sys.modules):
        if name == "my_model":
            monkeypatch.delitem(sys.modules, name)
    (tmp_path / "my_model.py").write_text(MODEL)
    for step in (9, 10, 11):
        torch.manual_seed(step)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        state = model.state_dict()
        state["1.num_batches_tracked"].fill_(step)
        torch.save({"epoch": step, "model": state}, f"epoch-{step}.pt")
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def without_coefficients(err: str) -> str:
    """Leave out what is told before the work starts."""
    return re.sub(r"^coefficients: .*\n", "", err, flags=re.MULTILINE)


def without_numbers(text: str) -> str:
    """Replace what differs from run to run: times, rates and peak memory."""
    text = re.sub(r"[\d.]+ s (\([^)]*\)|in all)", r"T s", text)
    text = re.sub(r"at [\d.]+ [kMG]?B/s", "at R", text)
    text = re.sub(r"bottleneck: \w+", "bottleneck: S", text)
    text = re.sub(r"buffers of [\d.]+ [kMG]?B host", "buffers of B host", text)
    return re.sub(r"peak memory [\d.]+ [kMG]B", "peak memory M", text)


def test_average_prints_a_summary_and_notes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "average", "epoch-*.pt", "-o", "swa")
    assert code == 0
    assert without_numbers(out) == (
        "swa: average of 3 checkpoints\n"
        "  read 408 B at R on cpu, wrote 136 B; T s, peak memory M\n"
        "  reading T s, arithmetic T s, writing T s, syncing T s; bottleneck: S\n"
        "  1 integer tensors differed, taken from epoch-11.pt: 1.num_batches_tracked\n"
    )
    assert err == (
        "coefficients: uniform: 0.333333 each of 3 checkpoints (epoch-9.pt to epoch-11.pt)\n"
        "note: 2 BatchNorm statistics are averaged with the weights; recompute them on training "
        "data: pass --model and --data, or run ckptavg recompute-bn\n"
    )
    assert sorted(tree(here / "swa")) == ["ckptavg.json", "model.safetensors"]


def test_average_with_bn_pass_in_one_go(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(
        capsys, "average", "epoch-{9..11}.pt", "-o", "swa", "--model", "my_model:build",
        "--data", "my_model:batches",
    )  # fmt: skip
    assert code == 0
    assert err == (
        "coefficients: uniform: 0.333333 each of 3 checkpoints (epoch-9.pt to epoch-11.pt)\n"
        "note: BatchNorm statistics come from batches of about 12 samples; batches of 128 or more "
        "are closer to what the model will meet\n"
    )
    assert "  BatchNorm: 1 layers recomputed over 25 samples in 2 batches, T s\n" in (
        without_numbers(out)
    )
    loaded = load_file(here / "swa" / "model.safetensors")
    inputs = torch.cat([torch.arange(60.0).reshape(20, 3), torch.ones(5, 3)]).double()
    weights = [torch.load(f"epoch-{step}.pt")["model"] for step in (9, 10, 11)]
    mean = {name: sum(one[name].double() for one in weights) / 3 for name in weights[0]}
    features = inputs @ mean["0.weight"].T + mean["0.bias"]
    for name, expected in (("running_mean", features.mean(0)), ("running_var", features.var(0))):
        torch.testing.assert_close(loaded[f"1.{name}"].double(), expected, rtol=1e-5, atol=0)
    assert loaded["1.num_batches_tracked"].item() == 2


def test_recompute_bn_changes_only_the_statistics(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(
        capsys, "recompute-bn", "epoch-9.pt", "-o", "fixed", "--model", "my_model:build",
        "--model-arg", "width=4", "--data", "my_model:batches", "--batches", "1",
    )  # fmt: skip
    assert code == 0
    assert out.startswith("fixed: epoch-9.pt with recomputed BatchNorm statistics\n")
    before, after = torch.load("epoch-9.pt")["model"], load_file("fixed/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_dry_run_tells_the_plan_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(
        capsys, "average", "epoch-11.pt", "epoch-9.pt", "epoch-10.pt", "-o", "swa",
        "--coefficients", "1/2,1/3,1/6", "--dry-run", "--io-threads", "2",
    )  # fmt: skip
    assert code == 0
    size = "2.98 kB"
    assert re.sub(r"[\d.]+ kB\n", f"{size}\n", out) == (
        "would average 3 checkpoints "
        "(coefficients:0.3333333333333333,0.16666666666666666,0.5) into swa; "
        "nothing was read but headers\n"
        "  checkpoint   step  epoch  coefficient     size\n"
        f"  epoch-9.pt      -      9     0.333333  {size}\n"
        f"  epoch-10.pt     -     10     0.166667  {size}\n"
        f"  epoch-11.pt     -     11          0.5  {size}\n"
        "tensors: 6 averaged (6 float32)\n"
        "  1 integer or bool tensors copied; where checkpoints differ, from epoch-11.pt: "
        "1.num_batches_tracked\n"
        "read 408 B, write 136 B: model.safetensors (136 B)\n"
        "on cpu: 2 threads, chunks of 1.05 MB; buffers of 9.23 MB host, 0 B device memory\n"
    )
    assert not (here / "swa").exists()


def test_json_output_can_be_parsed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "average", "epoch-*.pt", "-o", "swa", "--json")
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert told["output"] == "swa"
    assert told["n_checkpoints"] == 3
    assert told["read_nbytes"] == 408
    assert told["outputs"][0]["differing"] == ["1.num_batches_tracked"]
    code, out, _ = call(capsys, "average", "epoch-*.pt", "-o", "x", "--json", "--dry-run")
    plan = json.loads(out)
    assert [one["epoch"] for one in plan["checkpoints"]] == [9, 10, 11]
    assert plan["write_nbytes"] == 136
    code, out, _ = call(capsys, "inspect", "swa", "--json")
    (info,) = json.loads(out)
    assert info["tensors"]["0.weight"] == {"dtype": "float32", "shape": [4, 3], "nbytes": 48}


def test_a_torch_file_is_planned_and_written_when_asked(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("average", "epoch-*.pt", "-o", "swa", "--output-format", "torch")
    code, out, _ = call(capsys, *asked, "--dry-run")
    assert (code, "read 408 B, write 136 B: model.pt (136 B)\n" in out) == (0, True)
    _, out, _ = call(capsys, *asked, "--dry-run", "--json")
    assert json.loads(out)["shards"] == [{"filename": "model.pt", "nbytes": 136}]
    assert call(capsys, *asked)[0] == 0
    assert sorted(tree(here / "swa")) == ["ckptavg.json", "model.pt"]
    assert len(torch.load("swa/model.pt", weights_only=True)) == 7
    code, out, _ = call(capsys, "inspect", "swa")
    assert out.startswith("swa: torch directory, 7 tensors, 33 values, 136 B in 1 file\n")
    code, out, err = call(capsys, *asked, "--max-shard-size", "5GB")
    assert (code, out) == (2, "")
    assert "a torch file is never split: leave out max_shard_bytes (--max-shard-size)" in err
    code, _, _ = call(
        capsys, "recompute-bn", "swa", "-o", "fixed", "--model", "my_model:build", "--data",
        "my_model:batches", "--output-format", "torch", "--keep-prefix",
    )  # fmt: skip
    assert (code, sorted(tree(here / "fixed"))) == (0, ["ckptavg.json", "model.pt"])


def test_inspect_shows_what_is_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "inspect", "epoch-9.pt")
    assert code == 0
    assert out == (
        "epoch-9.pt: torch file, epoch 9, 7 tensors, 33 values, 136 B in 1 file\n"
        "  tensor                   dtype   shape  size\n"
        "  0.weight               float32     4x3  48 B\n"
        "  0.bias                 float32       4  16 B\n"
        "  1.weight               float32       4  16 B\n"
        "  1.bias                 float32       4  16 B\n"
        "  1.running_mean         float32       4  16 B\n"
        "  1.running_var          float32       4  16 B\n"
        "  1.num_batches_tracked    int64  scalar   8 B\n"
    )


AVERAGE = ["average", "epoch-*.pt", "-o", "swa"]
ONE = ["average", "epoch-9.pt", "-o", "x"]
BATCHES = ["--data", "my_model:batches"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["average", "nope.pt", "-o", "swa"], 1, "nope.pt: no such file or directory"),
        (["average", "epoch-12.pt", "-o", "swa"],
         1, "epoch-12.pt: no such file or directory; did you mean epoch-11.pt?"),
        ([*AVERAGE, "--coefficients", "1,2"], 2, "2 coefficients for 3 checkpoints"),
        ([*AVERAGE, "--device", "tpu"],
         2, "device: 'tpu' is not one of auto, cpu, cuda, cuda:0, cuda:1, ..."),
        ([*AVERAGE, "--state-key", "ema"],
         1, "epoch-9.pt: no entry 'ema': 'ema' is not among 'epoch', 'model'"),
        ([*AVERAGE, "--model", "my_model:nope", *BATCHES], 1,
         "--model my_model:nope: cannot be imported: AttributeError: module 'my_model' has no "
         "attribute 'nope'"),
        ([*AVERAGE, "--model", "my_model:build", "--model-arg", "width=5", *BATCHES],
         1, "epoch-11.pt: '0.weight' has shape [4, 3], [5, 3] in the model"),
        ([*AVERAGE, "--model", "my_model:build", "--data", "my_model:broken"],
         1, "the BatchNorm pass failed: ValueError: the disk of the data is on fire"),
        (["inspect", "my_model.py"],
         1,
         "my_model.py: is neither a safetensors file nor a torch or numpy file, or its beginning "
         "is damaged"),
    ],
)  # fmt: skip
def test_errors_are_one_line_with_the_documented_code(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    found, out, err = call(capsys, *arguments)
    assert (found, out, without_coefficients(err)) == (code, "", f"ckptavg: error: {message}\n")
    assert not list(here.glob("swa*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["average", "-o", "swa"], "Missing argument 'SOURCES...'"),
        (["average", "epoch-9.pt"], "Missing option '-o' / '--output'"),
        ([*ONE, "--memory", "lots"], "'lots' is not a size such as 512MiB or 5GB"),
        ([*ONE, "--memory", "0MB"], "'0MB' is not a positive size"),
        ([*ONE, "--coefficients", "a,b"], "'a,b' is not a list of numbers such as 0.2,0.3,0.5"),
        ([*ONE, "--model", "my_model:build"],
         "--model and --data belong together: the BatchNorm pass needs both"),
        ([*ONE, "--samples", "3"], "--samples needs --model and --data"),
        ([*ONE, "--model", "my_model", "--data", "a:b"],
         "--model: 'my_model' is not of the form pkg.mod:thing"),
        (["recompute-bn", "epoch-9.pt", "-o", "x", "--data", "a:b"], "Missing option '--model'"),
        (["averag"], "No such command 'averag'"),
    ],
)  # fmt: skip
def test_wrong_usage_exits_with_2(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_debug_shows_the_traceback(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(
        capsys, "average", "epoch-9.pt", "-o", "x", "--model", "my_model:build", "--data",
        "my_model:broken", "--debug",
    )  # fmt: skip
    assert code == 1
    assert 'raise ValueError("the disk of the data is on fire")' in err
    assert err.endswith(
        "ckptavg: error: the BatchNorm pass failed: ValueError: the disk of the data is on fire\n"
    )


def test_names_from_files_are_escaped(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "w\x1b[31m\n\u202ename"
    save_checkpoint(here / "c", {hostile: torch.ones(1)}, "safetensors")
    _, out, _ = call(capsys, "inspect", "c.safetensors")
    assert "w\\x1b[31m\\n\\u202ename" in out
    assert "\x1b" not in out
    save_checkpoint(here / "d", {"plain": torch.ones(1)}, "safetensors")
    _, _, err = call(capsys, "average", "c.safetensors", "d.safetensors", "-o", "x")
    assert "'w\\x1b[31m\\n\\u202ename' is in c.safetensors, not in d.safetensors" in err
    assert err.count("\n") == 1


def test_every_error_has_its_exit_code() -> None:
    codes = {error.__name__: exit_code_of(error("x")) for error in CkptavgError.__subclasses__()}
    assert {name for name, code in codes.items() if code != 1} == {
        UsageError.__name__,
        AfterPublishError.__name__,
    }
    assert codes[UsageError.__name__] == 2
    assert codes[AfterPublishError.__name__] == 3


@pytest.mark.parametrize("name", list(_COMMANDS))
def test_help_opens_with_a_sentence_and_closes_with_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, name, "--help")
    assert code == 0
    examples = out.split("Examples:\n")[1].strip().splitlines()
    assert len(examples) >= 2
    assert all(f"ckptavg {name} " in line for line in examples)


def test_every_option_has_help() -> None:
    context = click.Context(cli)
    for name in _COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        assert command.help
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name}"


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ckptavg", *arguments]


def test_help_version_and_completion_do_not_import_torch_or_numpy() -> None:
    code = (
        "import sys; from ckptavg.cli import run; run(sys.argv[1:]); "
        "print({'torch', 'numpy', 'huggingface_hub', 'tqdm'} & set(sys.modules))"
    )
    for arguments in (["--help"], ["--version"], ["average", "--help"]):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        assert result.stdout.endswith("set()\n"), arguments
    environment = {**os.environ, "_CKPTAVG_COMPLETE": "bash_source"}
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ckptavg"],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    assert "_ckptavg_completion" in result.stdout
    assert not re.search(r"\| +(torch|numpy)$", result.stderr, re.MULTILINE)


def test_averaging_on_a_cpu_does_not_import_torch(here: Path) -> None:
    code = (
        "import sys; from ckptavg.cli import run; "
        "code = run(['average', 'epoch-*.pt', '-o', 'swa', '--quiet']); "
        "print(code, {'torch', 'huggingface_hub', 'click', 'tqdm'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith("0 {'click'}\n")


def test_full_stdout_is_told_as_published_or_as_failed(here: Path) -> None:
    for arguments, code, message in (
        (("average", "epoch-*.pt", "-o", "one"), 3, "one: is published and whole, but then: the "),
        (("inspect", "epoch-9.pt"), 1, "the "),
    ):
        with Path("/dev/full").open("w") as full:
            result = subprocess.run(
                program(*arguments), stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert result.returncode == code
        assert f"{message}result cannot be printed: No space left on device\n" in result.stderr
    assert (here / "one" / "model.safetensors").exists()


@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&-", "2>/dev/full"])
def test_streams_that_nobody_reads_do_not_fail_a_run(here: Path, closing: str) -> None:
    command = f"{sys.executable} -m ckptavg average epoch-9.pt epoch-10.pt -o one {closing}"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
    assert (here / "one" / "model.safetensors").exists()


def test_closed_pipe_does_not_fail_a_finished_run(here: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        program("average", "epoch-*.pt", "-o", "two"), stdout=writing, stderr=subprocess.PIPE,
        check=False,
    )  # fmt: skip
    os.close(writing)
    assert result.returncode == 0
    assert (here / "two" / "model.safetensors").exists()


def test_names_that_the_terminal_cannot_show_are_escaped(here: Path) -> None:
    save_checkpoint(here / "c", {"层.weight": torch.ones(1)}, "safetensors")
    result = subprocess.run(
        program("inspect", "c.safetensors"), capture_output=True, check=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    assert b"\\u5c42.weight" in result.stdout


def test_progress_shows_bytes_rate_and_remaining_time_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, quiet, shown in (
        (Terminal(), False, True),
        (Terminal(), True, False),
        (io.StringIO(), False, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        with ProgressBars(quiet=quiet) as progress:
            progress("average", 50_000_000, 100_000_000)
            time.sleep(0.2)
            progress("average", 25_000_000, 100_000_000)
            progress("batchnorm", 128, None)
        text = stream.getvalue()
        assert bool(text) is shown
        if shown:
            assert re.search(r"average:  75%.*75\.0M/100M \[\d\d:\d\d<\d\d:\d\d, .*B/s\]", text)
            assert re.search(r"batchnorm: [\d.]+sample", text)


def test_signals_that_were_ignored_stay_ignored(here: Path) -> None:
    """Under nohup a run outlives the terminal."""
    code = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        "from ckptavg.cli import _catch_signals; _catch_signals(); "
        "os.kill(os.getpid(), signal.SIGHUP); print('alive')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "alive\n"


def test_what_user_code_prints_does_not_mix_with_json(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "chatty.py").write_text(
        "import my_model\nprint('importing')\n"
        "def build():\n    print('building')\n    return my_model.build()\n"
        "def data():\n    print('loading')\n    yield from my_model.batches\n"
    )
    code, out, err = call(
        capsys, "average", "epoch-*.pt", "-o", "swa", "--json", "--model", "chatty:build",
        "--data", "chatty:data",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["outputs"][0]["batchnorm"]["n_samples"] == 25
    assert {"importing", "building", "loading"} <= set(err.split())


@pytest.mark.parametrize("code", ["0", "7", "'words'"])
def test_user_code_that_exits_is_a_failure_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], code: str
) -> None:
    (here / "quitter.py").write_text(f"import sys\ndef data():\n    sys.exit({code})\n")
    found, _, err = call(
        capsys, "average", "epoch-*.pt", "-o", "swa", "--model", "my_model:build", "--data",
        "quitter:data",
    )  # fmt: skip
    sys.modules.pop("quitter", None)
    assert found == 1
    told = f"ckptavg: error: the BatchNorm pass failed: SystemExit: {code.strip(chr(39))}\n"
    assert without_coefficients(err) == told
    assert not (here / "swa").exists()


def test_dry_run_checks_that_the_model_fits(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", "my_model:build", "--data", "my_model:batches", "--dry-run")
    code, out, _ = call(capsys, *AVERAGE, *options)
    assert code == 0
    assert "then BatchNorm statistics are recomputed: the model fits the average\n" in out
    code, _, err = call(capsys, *AVERAGE, *options, "--model-arg", "width=5")
    assert code == 1
    assert err == "ckptavg: error: epoch-11.pt: '0.weight' has shape [4, 3], [5, 3] in the model\n"
    assert not (here / "swa").exists()


def test_dry_run_refuses_a_bad_destination(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "swa").mkdir()
    code, _, err = call(capsys, *AVERAGE, "--dry-run")
    assert code == 1
    assert err == "ckptavg: error: swa: already exists; pass --overwrite to replace it\n"


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGINT, 130, "ckptavg: error: ended by SIGINT; nothing was published\n"),
        (signal.SIGTERM, 143, "ckptavg: error: ended by SIGTERM; nothing was published\n"),
        (signal.SIGHUP, 129, "ckptavg: error: ended by SIGHUP; nothing was published\n"),
    ],
)
def test_signals_end_the_run_with_nothing_published(
    here: Path, number: signal.Signals, code: int, message: str
) -> None:
    (here / "slow.py").write_text(
        "import time, torch\n"
        "def batches():\n"
        "    open('started', 'w').close()\n"
        "    while True:\n"
        "        time.sleep(0.01)\n"
        "        yield torch.ones(5, 3)\n"
    )
    process = subprocess.Popen(
        program(
            "average", "epoch-*.pt", "-o", "swa", "--model", "my_model:build", "--data",
            "slow:batches",
        ),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (here / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(here.glob("swa.partial-*"))
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    (kept,) = (path.name for path in here.glob("swa*"))  # the average, to continue with
    continued = f"; 100 % of the average is kept in {kept}; the same command continues it\n"
    assert (process.returncode, err) == (code, message.rstrip() + continued)
    assert kept.startswith("swa.partial-")


# run directories

RUN = """run: a run of 5 checkpoints, 3 to take
  checkpoint       step  eval_loss       lr  size                 layout
  checkpoint-500    500      1.002  0.00095  16 B  safetensors directory        complete
  checkpoint-1000  1000      1.001   0.0009  16 B  safetensors directory        complete
  checkpoint-1200  1200          -        -     -                      -  cannot be read
  checkpoint-1500  1500    1.00067  0.00085  16 B  safetensors directory        complete
  checkpoint-2000  2000          -        -     -                      -        left out
  checkpoint-1200: cannot be read, run/checkpoint-1200: holds no weights: it is empty
  checkpoint-2000: left out, it is not whole: run/checkpoint-2000/model.safetensors: is empty (0 bytes)
  note: tmp-checkpoint-3000: its name says that it is not finished
"""  # noqa: E501  # as the terminal shows it


@pytest.fixture
def broken_run(here: Path) -> None:
    """A run with a checkpoint that is broken, and others that are still being written."""
    trainer_run("run")
    Path("run/checkpoint-1200").mkdir()
    Path("run/checkpoint-2000").mkdir()
    Path("run/checkpoint-2000/model.safetensors").touch()
    Path("run/tmp-checkpoint-3000").mkdir()


@pytest.mark.usefixtures("broken_run")
def test_inspect_lists_the_checkpoints_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "inspect", "run")
    assert (code, out, err) == (0, RUN, "")
    code, out, _ = call(capsys, "inspect", "run", "--last", "1", "--match", "*500")
    assert out.splitlines()[0] == "run: a run of 1 checkpoint, 1 to take"
    assert "checkpoint-1500" in out
    assert "checkpoint-500" not in out


@pytest.mark.usefixtures("broken_run")
def test_inspect_lists_a_run_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "inspect", "run", "run/checkpoint-500", "--json")
    assert code == 0
    run_of_five, one = json.loads(out)
    assert one["layout"] == "safetensors directory"
    assert list(run_of_five) == ["source", "checkpoints", "has_weights", "notes"]
    assert run_of_five["checkpoints"][0] == {
        "name": "checkpoint-500",
        "source": "run/checkpoint-500",
        "layout": "safetensors directory",
        "step": 500,
        "epoch": None,
        "learning_rate": 0.00095,
        "metrics": {"eval_loss": 1.002},
        "nbytes": 16,
        "left_out": None,
        "problem": None,
    }
    states = [
        (one["left_out"] is None, one["problem"] is None) for one in run_of_five["checkpoints"]
    ]
    assert states == [(True, True), (True, True), (True, False), (True, True), (False, False)]


def test_inspect_shows_a_final_model_after_its_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_run("run", (500, 1000))
    final_model("run")
    code, out, _ = call(capsys, "inspect", "run")
    assert code == 0
    first, *_, model, _, _ = out.splitlines()
    assert first == "run: a run of 2 checkpoints, 2 to take"
    assert model.startswith("run: safetensors directory, step 1500, ")


def test_inspect_shows_epochs_where_there_are_any(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "inspect", ".")
    assert code == 0
    assert out == (
        ".: a run of 3 checkpoints, 3 to take\n"
        "  checkpoint   step  epoch  lr   size      layout\n"
        "  epoch-9.pt      -      9   -  136 B  torch file  complete\n"
        "  epoch-10.pt     -     10   -  136 B  torch file  complete\n"
        "  epoch-11.pt     -     11   -  136 B  torch file  complete\n"
    )


def test_average_tells_what_it_took_of_a_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_run("run")
    Path("run/checkpoint-2000").mkdir()
    code, out, err = call(capsys, "average", "run", "--last", "2", "-o", "swa")
    assert code == 0
    assert out.startswith("swa: average of 2 checkpoints\n")
    assert err == (
        "coefficients: uniform: 0.5 each of 2 checkpoints (run/checkpoint-1000 to "
        "run/checkpoint-1500)\n"
        "note: run: left out checkpoint-2000: it is not whole: run/checkpoint-2000: holds no "
        "weights: it is empty\n"
        "note: took 2 of 3 checkpoints (--last 2): checkpoint-1000 to checkpoint-1500\n"
    )
    code, out, err = call(capsys, "average", "run", "--last", "1", "-o", "x", "--quiet")
    assert (code, err) == (0, "")
    code, out, _ = call(capsys, "average", "run", "--first", "1", "-o", "y", "--dry-run")
    assert code == 0
    assert "  run/checkpoint-500   500 " in out


@pytest.mark.usefixtures("broken_run")
def test_a_broken_checkpoint_in_a_run_is_one_line_that_says_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = call(capsys, "average", "run", "-o", "swa")
    assert (code, out) == (1, "")
    assert err == (
        "ckptavg: error: run/checkpoint-1200: holds no weights: it is empty; it is not the newest "
        "of its run, so not left out by itself; --match or --steps leaves it out\n"
    )
    assert call(capsys, "average", "run", "-o", "swa", "--match", "*00", "--last", "1")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--last", "0"], "Invalid value for '--last': 0 is not in the range x>=1"),
        (["--first", "-3"], "Invalid value for '--first': -3 is not in the range x>=1"),
        (["--every", "0"], "Invalid value for '--every': 0 is not in the range x>=1"),
        (["--every", "x"], "Invalid value for '--every': 'x' is not a valid integer range"),
        (["--steps", "9"], "'9' is not a range of steps such as 1000:9000 or 1000:"),
        (["--steps", "9:1"], "steps 9:1: the first step is after the last"),
        (["--last", "1", "--first", "1"], "--last and --first exclude each other"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("command", [["average", "-o", "swa"], ["inspect"]], ids=lambda one: one[0])
def test_a_selection_without_sense_is_wrong_usage(
    here: Path, capsys: pytest.CaptureFixture[str], command: list[str], arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    code, out, err = call(capsys, *command, "epoch-9.pt", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_names_in_a_run_are_escaped(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer_run("run", (1,))
    os.rename("run/checkpoint-1", "run/step-1\x1b[31m\n\u202e")  # noqa: PTH104  # as it is
    Path("run/checkpoint-2\x1b[2J").mkdir()
    for command in (["inspect", "run"], ["average", "run", "-o", "swa", "--match", "*1*"],
                    ["average", "run", "-o", "out"]):  # fmt: skip
        _, out, err = call(capsys, *command)
        assert "\\x1b" in out + err
        assert not {"\x1b", "\u202e"} & set(out + err)


def test_a_folder_without_checkpoints_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    for command in (["inspect", "empty"], ["average", "empty", "-o", "swa", "--last", "3"]):
        code, out, err = call(capsys, *command)
        assert (code, out) == (1, "")
        assert err == "ckptavg: error: empty: holds no weights: it is empty\n"
