"""What was evaluated already, kept beside an output that is being made, so that nothing is twice.

What was judged, by whom, and its metrics.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from ckptavg.eval_command import EvalCommand
from ckptavg.line_log import LineLog
from ckptavg.recorded_recipe import importable_name
from ckptavg.results import BnPass


class EvaluationLog:
    """Metrics by name, in memory and in a file that outlives an interruption."""

    def __init__(
        self,
        path: Path | None = None,
        judge: str | None = None,
        failed: Callable[[OSError], Exception] = lambda error: error,
    ) -> None:
        """Read what is there.

        Args:
            path: The file; None, or a judge without a name, keeps nothing.
            judge: What the metrics come from (model, data, evaluation, options): those of another
                judge are not taken.
            failed: Makes the error to raise when the storage refuses.
        """
        self._judge = judge
        self._failed = failed
        self._known: dict[str, dict[str, float]] = {}
        self._log: LineLog | None = None
        if path is None or judge is None:
            return
        try:
            self._log = LineLog(path)
        except OSError as error:
            raise failed(error) from error
        for entry in self._log.entries:
            if entry.get("judge") == judge:
                self._known[entry["what"]] = entry["metrics"]

    def get(self, what: str) -> dict[str, float] | None:
        """Return the metrics of something; None if it was not evaluated yet."""
        return self._known.get(what)

    def add(self, what: str, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of something.

        Raises:
            OutputError: If the storage refuses.
        """
        self._known[what] = dict(metrics)
        if self._log is None:
            return
        try:
            self._log.add({"what": what, "judge": self._judge, "metrics": self._known[what]})
        except OSError as error:
            raise self._failed(error) from error


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
        elif option == "eval" and (names := _names_of_loaders(thing)) is not None:
            told += names
        else:
            return None
    return hashlib.sha256(repr(told).encode("utf-8", "surrogatepass")).hexdigest()  # no tokens


def _names_of_loaders(evaluation: object) -> list[object] | None:
    """Return what tells an evaluation on loaders from another; None where names do not."""
    from ckptavg.labelled import LabelledEvaluation  # imports torch

    if not isinstance(evaluation, LabelledEvaluation):
        return None
    told: list[object] = [evaluation.amp, evaluation.channels_last, evaluation.weight_decay]
    loaders = {f"loader {loader.name}": loader.batches for loader in evaluation.loaders}
    for what, thing in {**loaders, "forward": evaluation.forward, "eval": evaluation.also}.items():
        name = None if thing is None else importable_name(thing)
        if name is None and thing is not None:
            return None
        told += [what, name]
    return told
