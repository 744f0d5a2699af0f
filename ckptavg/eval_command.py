"""What a program of the user's says of a model directory: lm-eval, a script, anything that prints.

It runs through the shell, sees the directory in place of ``{model}``, and prints a number or JSON.
"""

import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptavg.errors import ModelError, UsageError

_PLACE = "{model}"
_MAX_SHOWN = 200


@dataclass(frozen=True, slots=True)
class EvalCommand:
    """A shell command that judges a model directory.

    Attributes:
        command: With ``{model}`` where the (quoted) path of the directory goes. What it prints to
            stdout, or the last line of that, is a number or JSON. Of a JSON object all numbers
            count; those inside of others are called ``outer/inner``.

    Raises:
        UsageError: If it does not say where the model goes.
    """

    command: str

    def __post_init__(self) -> None:
        if _PLACE not in self.command:
            raise UsageError(
                f"the evaluation command '{self.command}' does not say where the model goes: put "
                f"{_PLACE} there (--eval-command 'python my_eval.py {_PLACE}')"
            )
        if re.search(r"""["']{model}|{model}["']""", self.command):
            raise UsageError(
                f"the evaluation command '{self.command}' has quotes around {_PLACE}: leave them "
                "out, the path is quoted already"
            )

    def evaluated(self, directory: Path) -> dict[str, float]:
        """Run the command on a model directory and return its metrics; one is ``metric``.

        Its stderr goes where that of this process goes. It is ended when this process is
        interrupted.

        Raises:
            ModelError: If it fails, prints no number, or changes the model.
        """
        before = _contents(directory)
        typed = self.command.replace(_PLACE, shlex.quote(str(directory.resolve())))
        code, printed = _run(typed)
        if code != 0:
            how = f"exited with {code}" if code > 0 else f"was ended by {_signal_name(-code)}"
            raise ModelError(f"the evaluation command {how}: {self.command}")
        after = _contents(directory)
        changed = sorted(name for name, stamp in before.items() if after.get(name) != stamp)
        if changed:
            raise ModelError(f"the evaluation command changed '{changed[0]}' in the model")
        for name in sorted(after.keys() - before.keys(), reverse=True):  # caches, results
            path = directory / name
            with suppress(OSError):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        metrics = dict(_numbers(_value(printed)))
        if not metrics:
            raise ModelError(
                f"the evaluation command printed no number: {_shortened(printed)!r}, expected a "
                "number or JSON on its last line"
            )
        return metrics


def _run(command: str) -> tuple[int, str]:
    with subprocess.Popen(
        command,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # it has children of its own: all are ended together
    ) as process:
        try:
            printed, _ = process.communicate()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise
    return process.returncode, printed


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _contents(directory: Path) -> dict[str, tuple[int, int]]:
    """Return what is in a directory: name -> size and modification time; 0 for directories."""
    return {
        str(path.relative_to(directory)): (0, 0)
        if path.is_dir() and not path.is_symlink()
        else (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in directory.rglob("*")
    }


def _value(printed: str) -> Any:
    """Return what was printed as JSON, or the last line of it; None if neither is."""
    for text in (printed, *printed.strip().splitlines()[-1:]):
        with suppress(ValueError, RecursionError):
            return json.loads(text)
        with suppress(ValueError):
            return float(text)  # such as inf or 1_000, which JSON has not
    return None


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}/{key}" if name else str(key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(OverflowError):
            yield name or "metric", float(value)


def _shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _MAX_SHOWN else f"...{text[-_MAX_SHOWN:]}"
