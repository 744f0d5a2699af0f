"""Kinds of runs that a fault is put into, and what tells whether an output is whole.

A scenario lays its inputs once; ``reset`` puts back what a run changed. Inputs are several blocks
long, so that work is done in several steps.
"""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostile import entry, safetensors_bytes

from faults.runs import Finished, Runner, Tracing

OUTPUT = "out"
_PROVENANCE = "ckptavg.json"
_N_TENSORS = 3
_SMALL_SHARDS = "3KB"
_BLOCK_NBYTES = 1000


def checkpoint_bytes(number: int, n_tensors: int = _N_TENSORS) -> bytes:
    """Return a safetensors file with tensors of 500 float32 and a counter that differ by number."""
    header, data = {}, b""
    for index in range(n_tensors):
        values = struct.pack("<500f", *(number + index + at / 7 for at in range(500)))
        header[f"w{index}"] = entry("F32", [500], len(data), len(data) + len(values))
        data += values
    header["n"] = entry("I64", [], len(data), len(data) + 8)
    return safetensors_bytes(header, data + struct.pack("<q", number))


def write_model(directory: Path, number: int) -> None:
    """Write a model directory with side files, one of them in a folder."""
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(checkpoint_bytes(number))
    (directory / "config.json").write_text('{"model_type": "test"}\n')
    templates = directory / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("{{ messages }}\n")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of run.

    Attributes:
        name: What messages call it.
        options: Arguments beside the sources and the output.
        directories: Whether the sources are model directories with side files.
        before: Arguments of a run that makes what is there before.
        interrupted_at: Makes what an interrupted run left, killed at this call on this path.
    """

    name: str
    options: Sequence[str] = ()
    directories: bool = False
    before: Sequence[str] | None = None
    interrupted_at: tuple[str, str, int] | None = None


KINDS = (
    Kind(name="single file"),
    Kind(name="sharded", options=("--max-shard-size", _SMALL_SHARDS), directories=True),
    Kind(
        name="overwrite",
        options=("--overwrite",),
        directories=True,
        before=("--dtype", "bfloat16"),
    ),
    Kind(
        name="resume",
        options=("--max-shard-size", _SMALL_SHARDS),
        interrupted_at=("write", "out.partial-{fingerprint}/.ckptavg-journal-0", 4),
    ),
    Kind(name="several outputs", options=("--scheme", "uniform", "--scheme", "ema:decay=0.5")),
    Kind(name="torch file", options=("--output-format", "torch", "--check-trajectory")),
)  # fmt: skip


class Scenario:
    """A kind of run in a directory of its own.

    Attributes:
        directory: Where all lies.
        arguments: What follows ``ckptavg``.
        fingerprint: Of the plan, which is part of names.
    """

    output = OUTPUT  # as it is typed

    def __init__(self, kind: Kind, directory: Path, runner: Runner) -> None:
        """Lay the inputs, and run once without faults."""
        self.kind = kind
        self.directory = directory
        self._inputs = directory / "inputs"
        sources = self.lay_inputs()
        self.arguments = [
            "average",
            *sources,
            "-o",
            self.output,
            "--io-threads",
            "1",
            *kind.options,
        ]
        self._initial = directory.with_name(f"{directory.name}-initial")
        self._initial.mkdir()
        self.fingerprint = ""
        self._lay_before(runner, sources)
        trace = self.run(runner, tracing=Tracing(calls=("mkdir", "openat"))).trace
        self.whole = summary(directory / OUTPUT)
        self.fingerprint = next(
            line.partition(f"{OUTPUT}.partial-")[2][:16] for line in trace if ".partial-" in line
        )
        if kind.interrupted_at is not None:
            call, template, when = kind.interrupted_at
            self.reset()
            self.run(
                runner,
                tracing=Tracing(
                    calls=(call,), paths=(self.path(template),), fault="signal=KILL", when=when
                ),
            )
            self._keep()
        self.reset()
        self.left_before = self.left_over()
        self.inputs = summary(self._inputs)
        self.old = summary(directory / OUTPUT)

    def lay_inputs(self) -> list[str]:
        """Write the inputs; return the sources."""
        self._inputs.mkdir(parents=True)
        sources = []
        for number in range(2):
            path = self._inputs / f"step-{number + 1}"
            if self.kind.directories:
                write_model(path, number)
            else:
                path = path.with_suffix(".safetensors")
                path.write_bytes(checkpoint_bytes(number))
            sources.append(str(path))
        return sources

    def _lay_before(self, runner: Runner, sources: Sequence[str]) -> None:
        if self.kind.before is not None:
            made = runner.run(
                ["average", *sources, "-o", OUTPUT, *self.kind.before], self.directory
            )
            assert made.code == 0, made.stderr
        self._keep()

    def _keep(self) -> None:
        """Keep what is beside the inputs, for ``reset``."""
        shutil.rmtree(self._initial)
        shutil.copytree(self.directory, self._initial, ignore=shutil.ignore_patterns("inputs"))

    def reset(self) -> None:
        """Put back what was there in the beginning; inputs are not touched."""
        for path in self.directory.iterdir():
            if path == self._inputs:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self._initial, self.directory, dirs_exist_ok=True)

    def path(self, template: str) -> str:
        """Return a path whose name holds the plan's fingerprint, in full."""
        return str(self.directory / template.replace("{fingerprint}", self.fingerprint))

    def template(self, path: str) -> str:
        """Return a path as ``path`` takes it; the same in every directory."""
        relative = str(Path(path).relative_to(self.directory))
        return relative.replace(self.fingerprint, "{fingerprint}")

    def run(
        self,
        runner: Runner,
        *,
        tracing: Tracing | None = None,
        meanwhile: Callable[[int], None] | None = None,
    ) -> Finished:
        """Run it."""
        return runner.run(
            self.arguments,
            self.directory,
            tracing=tracing,
            meanwhile=meanwhile,
            block_nbytes=_BLOCK_NBYTES,
        )

    def left_over(self) -> list[str]:
        """Return names that are neither inputs nor the output."""
        known = {"inputs", OUTPUT}
        return sorted(path.name for path in self.directory.iterdir() if path.name not in known)

    def state(self) -> str:
        """Tell whether the output is absent, old, or new and whole; what else is wrong if not."""
        if summary(self._inputs) != self.inputs:
            return "inputs changed"
        found = summary(self.directory / OUTPUT)
        if found == self.whole:
            return "new" if self.whole != self.old else "same"
        if found == self.old:
            return "old" if self.old else "absent"
        return f"neither old nor new: {sorted(found)}"


def summary(directory: Path) -> Mapping[str, str]:
    """Return what a directory holds: a digest for each file; empty if it is not there.

    Of provenances only what does not depend on time and place; that its hashes are those of the
    files is checked, too.
    """
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name == _PROVENANCE:
                content = _lasting(path, content)
            found[str(path.relative_to(directory))] = hashlib.sha256(content).hexdigest()
    return found


def _lasting(path: Path, content: bytes) -> bytes:
    try:
        told = json.loads(content)
    except ValueError:
        return b"not whole"
    for one in told["output"]["files"]:
        there = path.parent / one["name"]
        if not there.exists() or hashlib.sha256(there.read_bytes()).hexdigest() != one["sha256"]:
            return b"hashes of other files"
    return json.dumps([told["scheme"], told["output"]]).encode()
