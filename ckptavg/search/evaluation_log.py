"""What was evaluated already, kept beside an output that is being made, so that nothing is twice.

One JSON object a line: what was judged, by whom, and its metrics. A last line that was cut off is
passed over.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ckptavg.checkpoint.files import open_descriptor
from ckptavg.eval_command import EvalCommand
from ckptavg.recorded_recipe import importable_name
from ckptavg.results import BnPass


class EvaluationLog:
    """Metrics by name, in memory and in a file that outlives an interruption."""

    def __init__(self, path: Path | None, judge: str | None) -> None:
        """Read what is there.

        Args:
            path: The file; None, or a judge without a name, keeps nothing.
            judge: What the metrics come from (model, data, evaluation, options): those of another
                judge are not taken.
        """
        self._path = path = path if judge is not None else None
        self._judge = judge
        self._known: dict[str, dict[str, float]] = {}
        with suppress(OSError):
            for line in path.read_bytes().split(b"\n")[:-1] if path is not None else ():
                with suppress(ValueError, LookupError, TypeError, AttributeError):
                    entry = json.loads(line)
                    if entry["judge"] == judge:
                        metrics = {str(name): float(one) for name, one in entry["metrics"].items()}
                        self._known[str(entry["what"])] = metrics

    def get(self, what: str) -> dict[str, float] | None:
        """Return the metrics of something; None if it was not evaluated yet."""
        return self._known.get(what)

    def add(self, what: str, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of something.

        Raises:
            OSError: If they cannot be written.
        """
        self._known[what] = dict(metrics)
        if self._path is None:
            return
        entry = {"what": what, "judge": self._judge, "metrics": self._known[what]}
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = open_descriptor(self._path, flags, 0o666)
        try:
            os.write(descriptor, f"{json.dumps(entry)}\n".encode())  # one call: never mixed up
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def judge_text(evaluation: BnPass) -> str | None:
    """Return what tells one judge from another; None where names do not.

    A lambda, an object or a list of batches may be another one next time, under the same name.
    """
    told: list[object] = [evaluation.chosen()]
    for option, thing in (
        ("model", evaluation.model),
        ("data", evaluation.batches),
        ("forward", evaluation.forward),
        ("eval", evaluation.evaluate),
    ):
        if thing is None:
            continue
        if isinstance(thing, EvalCommand):
            told.append(thing.command)
        elif option in evaluation.names:
            told += [evaluation.names[option], evaluation.names.get(f"{option}-args")]
        elif (name := importable_name(thing)) is not None:
            told.append(name)
        else:
            return None
    return hashlib.sha256(repr(told).encode("utf-8", "surrogatepass")).hexdigest()  # no tokens
