"""What was evaluated already, kept beside an output that is being made, so that nothing is twice.

One JSON object a line: what was judged, by whom, and its metrics. A last line that was cut off is
passed over.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path

from ckptavg.checkpoint.files import open_descriptor
from ckptavg.results import BnPass


class EvaluationLog:
    """Metrics by name, in memory and in a file that outlives an interruption."""

    def __init__(self, path: Path | None, judge: str) -> None:
        """Read what is there.

        Args:
            path: The file; None keeps nothing.
            judge: What the metrics come from (model, data, evaluation, options): those of another
                judge are not taken.
        """
        self._path = path
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


def judge_text(evaluation: BnPass) -> str:
    """Return what tells one judge from another, as far as names do."""
    things = (evaluation.model, evaluation.batches, evaluation.forward, evaluation.evaluate)
    return repr([*map(_named, things), evaluation.chosen()])


def _named(thing: object) -> str:
    if isinstance(thing, partial):
        return f"{_named(thing.func)}{thing.args}{sorted(thing.keywords.items())}"
    name = getattr(thing, "__qualname__", None)
    if name is not None:
        return f"{getattr(thing, '__module__', '')}.{name}"
    return str(thing) if is_dataclass(thing) else type(thing).__qualname__
