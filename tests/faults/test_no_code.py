"""Nothing in an input runs: no command, no process, no connection, no import, no foreign file.

The system itself tells, call by call, what a run does with files that would run something if
anything loaded them. The command line runs one process for each; the library opens all in one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pytest
from hostile import (
    call,
    group,
    legacy_bytes,
    mapping,
    name,
    number,
    pickled,
    stack_name,
    tensor,
    text,
    torch_bytes,
)

from faults.case import Case, good_safetensors
from faults.corpus import distributed, numpy_files, pickled_code, torch_files
from faults.runs import CAN_TRACE, WHY_NOT_TRACED, Runner, Runners, Tracing
from faults.scenarios import OUTPUT
from faults.tally import CountCases

_CANARY = "canary"
_MODULES = (pickled_code, distributed, torch_files, numpy_files)
_PAYLOAD = "payload"
_PAYLOAD_SOURCE = f"open({_CANARY!r}, 'w').close()\ndef run(*_): pass\n"

_NEVER = (
    "execve", "execveat", "?fork", "?vfork", "ptrace",
    "socket", "socketpair", "connect", "bind", "listen", "sendto", "sendmsg",
    "kill", "tkill", "tgkill", "pidfd_open", "pidfd_send_signal",
    "?chmod", "fchmod", "fchmodat", "?chown", "fchown", "fchownat", "setuid", "setgid",
    "?link", "linkat", "?symlink", "symlinkat", "?mknod", "mknodat", "truncate",
)  # fmt: skip
_PROCESSES = ("clone", "clone3")  # threads are fine
_FILES = (
    "?open", "?creat", "openat", "openat2", "?mkdir", "mkdirat", "?unlink", "unlinkat", "?rmdir",
    "?rename", "renameat", "renameat2",
)  # fmt: skip
CALLS = (*_NEVER, *_PROCESSES, *_FILES)
_CALL = re.compile(r"\d+ +(?:<\.\.\. )?(?P<name>\w+)(?P<rest>.*)")
_READS_ONLY = re.compile(r"\bO_RDONLY\b(?!.*\bO_(CREAT|TRUNC|TMPFILE)\b)")
_PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<(?P<base>[^>]*)>, )?"(?P<path>(?:[^"\\]|\\.)*)"')
_MARK = "kill("  # the library's first and last call

OPEN_ALL = """
import json, os, sys
from pathlib import Path
from ckptavg import CkptavgError, open_checkpoint
from ckptavg.errors import printable

def examine(directory, source):
    os.chdir(directory)
    try:
        checkpoint = open_checkpoint(source)
    except CkptavgError as error:
        return str(error)
    checkpoint.close()
    return ""

good, bad = json.loads(Path(sys.argv[1]).read_text())
assert [examine(*one) for one in good] == [""] * len(good)
printable("\\0")  # a codec is a module, too
before = set(sys.modules)
os.kill(os.getpid(), 0)
found = [examine(*one) for one in bad]
os.kill(os.getpid(), 0)
modules = sorted(set(sys.modules) - before)
print(json.dumps([found, modules, "torch" in sys.modules, "payload" in sys.modules]))
"""


class Laid(NamedTuple):
    """A case that was built.

    Attributes:
        case: Which.
        directory: Where its files are.
        arguments: Of ``average``: the sources, and options.
    """

    case: Case
    directory: Path
    arguments: Sequence[str]


@pytest.fixture(scope="module")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Laid]:
    """Build every case that would run something, or make a canary if it were taken for code."""
    place = tmp_path_factory.mktemp("code")
    found = []
    for at, case in enumerate(case for module in _MODULES for case in module.cases()):
        directory = place / str(at)
        directory.mkdir()
        one = Laid(case, directory, [*case.build(directory)])
        if case.name.startswith(("code", "dcp-code")) or _holds_canary(directory):
            found.append(one)
    return found


def _holds_canary(directory: Path) -> bool:
    files = (path for path in directory.rglob("*") if path.is_file())
    return any(_CANARY.encode() in path.read_bytes() for path in files)


def names(directory: Path) -> set[str]:
    """Return all names below a directory."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def suspicious(trace: Iterable[str], output: Path | None = None) -> list[str]:
    """Return the calls that a run must not make.

    Args:
        trace: What strace wrote.
        output: What it may make and remove, under this name and longer ones; None is nothing.
    """
    return [line for line in trace if _is_suspicious(line, output)]


def _is_suspicious(line: str, output: Path | None) -> bool:
    found = _CALL.match(line)
    if found is None or "resumed>" in line:  # it began in another line
        return False
    call_name, rest = found["name"], found["rest"]
    if call_name in _PROCESSES:
        return "CLONE_THREAD" not in rest
    if call_name not in (one.lstrip("?") for one in _FILES):
        return True
    if call_name.startswith("open") and _READS_ONLY.search(rest):
        return False
    return not all(
        _is_own(Path(found["base"] or "/", found["path"]), output) for found in _PATH.finditer(rest)
    )


def _is_own(path: Path, output: Path | None) -> bool:
    return str(path) == os.devnull or (output is not None and str(path).startswith(str(output)))


# -- the command line


def wrong(runner: Runner, one: Laid) -> str:
    """Average a case under the system's eyes; return what is wrong then, empty if nothing is."""
    before = names(one.directory)
    finished = runner.run(
        ["average", *one.arguments, "-o", OUTPUT],
        one.directory,
        tracing=Tracing(calls=CALLS),
        stdout=os.devnull,  # what the runner itself opens is no file then
        stderr=os.devnull,
    )
    if not finished.trace:
        return "was not traced"
    if calls := suspicious(finished.trace, one.directory / OUTPUT):
        return f"calls {calls}"
    made = {name for name in names(one.directory) - before if name.partition("/")[0] != OUTPUT}
    if made:
        return f"made {sorted(made)}"
    shutil.rmtree(one.directory / OUTPUT, ignore_errors=True)
    return "" if finished.code in (0, 1, 2) else str(finished)


@pytest.mark.promise(1)
@pytest.mark.skipif(not CAN_TRACE, reason=WHY_NOT_TRACED)
def test_the_command_line_runs_nothing(
    laid: Sequence[Laid], runners: Runners, count_cases: CountCases
) -> None:
    def try_one(runner: Runner, one: Laid) -> str:
        found = wrong(runner, one)
        return found and f"{one.case.name}: {found}"

    found = runners.map(try_one, laid)
    assert not [one for one in found if one]
    assert len(found) >= 300
    count_cases(len(found))


def tracing_command(log: Path, command: Sequence[str]) -> Sequence[str]:
    """Return what runs a command, and writes down what it and its children do."""
    return ["strace", *Tracing(calls=CALLS).arguments(), "-o", str(log), *command]


@pytest.mark.skipif(not CAN_TRACE, reason=WHY_NOT_TRACED)
def test_what_runs_would_be_seen(tmp_path: Path) -> None:
    program = (
        "import os, socket, subprocess\n"
        "open('canary', 'w').close(); os.mkdir('x'); os.rename('x', 'y'); os.rmdir('y')\n"
        "os.system('true'); subprocess.run(['true']); os.fork() or os._exit(0)\n"
        "socket.socket().connect_ex(('127.0.0.1', 9)); os.unlink('canary'); os.kill(1, 0)\n"
        "open('out.partial-1', 'w').close(); open('/dev/null', 'w').close()\n"
    )
    log = tmp_path / "log"
    command = tracing_command(log, [sys.executable, "-S", "-c", program])
    subprocess.run(command, cwd=tmp_path, check=True)
    calls = suspicious(log.read_text().splitlines(), tmp_path / OUTPUT)
    seen = [found["name"] for found in map(_CALL.match, calls) if found]
    assert seen[:5] == ["execve", "openat", "mkdir", "rename", "rmdir"]
    assert seen.count("execve") >= 3
    assert sum(one in ("fork", "vfork", "clone", "clone3") for one in seen) >= 3
    assert seen[-4:] == ["socket", "connect", "unlink", "kill"]


# -- the library


def naming_a_module() -> Mapping[str, bytes]:
    """Return files whose pickles name a module that could be imported, by how they do."""
    run = name(_PAYLOAD, "run")
    storage = group(
        text("storage"), name(_PAYLOAD, "FloatStorage"), text("0"), text("cpu"), number(4)
    )
    values = {
        "called": call(run, text("x")),
        "held": run,
        "from-the-stack": stack_name(_PAYLOAD, "run"),
        "instance": b"(" + text("x") + f"i{_PAYLOAD}\nrun\n".encode(),
        "object": b"(" + run + b"o",
        "new": run + b")\x81",
        "new-with-keywords": run + b")}\x92",
        "submodule": name(f"{_PAYLOAD}.deep", "run"),
        "attribute": stack_name(_PAYLOAD, "run.__globals__"),
        "storage": tensor(stored=storage + b"Q"),
        "rebuilding": call(name(_PAYLOAD, "_rebuild_tensor_v2"), tensor()),
        "reconstructed": call(name("copyreg", "_reconstructor"), run, run, b"N"),
        "key": mapping([(run, b"N")]),
    }
    files = {}
    for what, value in values.items():
        root = mapping({"w": tensor(), "x": value})
        files[f"{what}.pt"] = torch_bytes(root)
        files[f"{what}.bin"] = legacy_bytes(root)
        files[f"{what}.pkl"] = pickled(root)
    return files


def lay_modules(place: Path) -> Sequence[tuple[str, str]]:
    """Lay files that name a module beside that module; return working directories and sources."""
    place.mkdir()
    (place / f"{_PAYLOAD}.py").write_text(_PAYLOAD_SOURCE)
    files = naming_a_module()
    for filename, content in files.items():
        (place / filename).write_bytes(content)
    directory = place / "distributed"
    directory.mkdir()
    (directory / ".metadata").write_bytes(pickled(call(name(_PAYLOAD, "run"))))
    (directory / "__0_0.distcp").write_bytes(torch_bytes(tensor()))
    return [(str(place), one) for one in (*files, directory.name)]


def lay_good(place: Path) -> Sequence[tuple[str, str]]:
    """Lay a good checkpoint of each kind; return working directories and sources."""
    place.mkdir()
    root = mapping({"w": tensor()})
    files = {
        "good.safetensors": good_safetensors(),
        "good.pt": torch_bytes(root),
        "good.bin": legacy_bytes(root),
        "good.npz": numpy_files.npz(numpy_files.npy()),
    }
    for filename, content in files.items():
        (place / filename).write_bytes(content)
    one = next(case for case in distributed.cases() if case.name.startswith("dcp-good/"))
    return [(str(place), source) for source in (*files, one.build(place)[0])]


@pytest.mark.promise(1)
@pytest.mark.skipif(not CAN_TRACE, reason=WHY_NOT_TRACED)
def test_the_library_runs_nothing_and_imports_nothing(
    laid: Sequence[Laid], tmp_path: Path, count_cases: CountCases
) -> None:
    modules = lay_modules(tmp_path / "modules")
    sources = [
        (str(one.directory), source)
        for one in laid
        for source in takewhile(lambda argument: not argument.startswith("-"), one.arguments)
    ]
    before = [names(one.directory) for one in laid]
    work = tmp_path / "work.json"
    work.write_text(json.dumps([lay_good(tmp_path / "good"), [*modules, *sources]]))
    log = tmp_path / "calls.trace"
    finished = subprocess.run(
        tracing_command(log, [sys.executable, "-c", OPEN_ALL, str(work)]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    lines = log.read_text(errors="replace").splitlines()
    first, last = (at for at, line in enumerate(lines) if _MARK in line)
    assert not suspicious(lines[first + 1 : last])
    said, imported, has_torch, has_payload = json.loads(finished.stdout)
    assert all(said[: len(modules)])
    assert not [one for one in imported if not one.startswith("ckptavg.")]
    assert not has_torch
    assert not has_payload
    assert [names(one.directory) for one in laid] == before
    assert not (tmp_path / "modules" / _CANARY).exists()
    count_cases(len(sources) + len(modules))
