"""What is measured at points: a BatchNorm pass, then the evaluation, some points side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ckptavg.batchnorm import recompute_side_by_side
from ckptavg.batchnorm.collect import NonFiniteError
from ckptavg.errors import BatchNormError, ModelError
from ckptavg.eval_command import EvalCommand
from ckptavg.evaluate import checked_metrics, evaluated, evaluation_state
from ckptavg.labelled import LabelledEvaluation, device_of
from ckptavg.live_model import LiveModel, user_code
from ckptavg.results import BnPass, Progress
from ckptavg.scratch import Scratch
from ckptavg.steps import stage_of

Put = Callable[[nn.Module], None]  # gives a model the weights of a point
Metrics = Mapping[str, float]

_MOST_SIDE_BY_SIDE = 16
_SHARE_OF_DEVICE = 4  # of the memory that is free, a fourth is for copies of the model


class PointJudge:
    """Evaluates a model at points, as many side by side as memory allows.

    Data is loaded once for all that stand side by side, and random numbers are the same for every
    point. A model that cannot be copied is evaluated at one point after the other.

    Attributes:
        n_side_by_side: How many points at once.
    """

    def __init__(self, live: LiveModel, evaluation: BnPass, memory_budget_bytes: int) -> None:
        """Prepare.

        Raises:
            UsageError: If statistics have to be recomputed, and there is no data.
        """
        self._live = live
        self._evaluation = evaluation
        self._seed = 0 if evaluation.seed is None else evaluation.seed
        self._models = [live.module]
        self._has_pass = live.must_recompute(of_what="other point")
        shares_data = self._has_pass or isinstance(evaluation.evaluate, LabelledEvaluation)
        if not shares_data or evaluation.train_mode == "model" or evaluation.compile:
            self.n_side_by_side = 1
        else:
            room = min(_MOST_SIDE_BY_SIDE, _room(live.module, memory_budget_bytes))
            self.n_side_by_side = room if room > 1 and self._is_copied() else 1

    def metrics(self, puts: Sequence[Put]) -> list[dict[str, float]]:
        """Return the metrics of points, at most ``n_side_by_side``.

        Raises:
            BatchNormError: If a statistic cannot be computed.
            ModelError: If model, data or evaluation fail.
        """
        models = self._copies(len(puts))
        for model, put in zip(models, puts, strict=True):
            put(model)
        live = self._live
        if self._has_pass:
            with user_code("the BatchNorm pass"), live.on_its_device():
                recompute_side_by_side(models, live.batches, live.options)
        function = self._evaluation.evaluate
        if function is None or isinstance(function, EvalCommand):
            raise AssertionError("check_landscape sees to it")
        with user_code("the evaluation"), live.on_its_device():
            if isinstance(function, LabelledEvaluation):
                with evaluation_state(models, self._seed):
                    return [checked_metrics(one) for one in function.of_models(models)]
            return [evaluated(model, function, seed=self._seed) for model in models]

    def _copies(self, count: int) -> list[nn.Module]:
        """Return the model and copies of it, alike in what points leave alone, such as integers."""
        while len(self._models) < count:
            with user_code("copying the model"):
                self._models.append(copy.deepcopy(self._live.module))
        for copied in self._models[1:count]:
            copied.load_state_dict(self._live.module.state_dict())
        return self._models[:count]

    def _is_copied(self) -> bool:
        try:
            self._copies(2)
        except ModelError:
            return False
        return True


class Survey:
    """Evaluates many points, remembers each, and goes on where an interrupted one stopped."""

    def __init__(
        self,
        judge: PointJudge,
        scratch: Scratch,
        progress: Progress | None,
        stage: str,
        n_points: int,
    ) -> None:
        """Take over what was evaluated before.

        Args:
            judge: Who evaluates.
            scratch: Where it is remembered.
            progress: As in ``average_checkpoints``.
            stage: What it is called there.
            n_points: How many points there will be in all.
        """
        self._judge = judge
        self._scratch = scratch
        self._known: dict[str, dict[str, float]] = {
            entry["point"]: entry["metrics"] for entry in scratch.entries
        }
        self.n_resumed = len(self._known)
        self._names = {name for metrics in self._known.values() for name in metrics}
        self._report = stage_of(progress, stage, n_points)

    def metrics(self, points: Mapping[str, Put]) -> dict[str, dict[str, float]]:
        """Return the metrics of points by their keys; a key is evaluated once.

        Where BatchNorm statistics are not finite, as far away they may be, all metrics are NaN.

        Raises:
            CkptavgError: As ``PointJudge.metrics`` does; OutputError if the storage refuses.
        """
        due = [key for key in points if key not in self._known]
        self._report(len(points) - len(due))
        step, overflowed = self._judge.n_side_by_side, []
        for first in range(0, len(due), step):
            keys = due[first : first + step]
            found = self._measured([points[key] for key in keys])
            for key, metrics in zip(keys, found, strict=True):
                if metrics is None:
                    overflowed.append(key)
                else:
                    self._remember(key, metrics)
            self._report(len(keys))
        for key in overflowed:
            if not self._names:
                raise BatchNormError(
                    "the BatchNorm statistics are not finite at any point: the data or the "
                    "weights hold infinity or NaN"
                )
            self._remember(key, dict.fromkeys(self._names, float("nan")))
        return {key: self._known[key] for key in points}

    def _measured(self, puts: Sequence[Put]) -> Sequence[dict[str, float] | None]:
        """Return the metrics of points; None where BatchNorm statistics overflow, far away."""
        try:
            return self._judge.metrics(puts)
        except NonFiniteError:
            if len(puts) == 1:
                return [None]
            return [metrics for put in puts for metrics in self._measured([put])]

    def _remember(self, key: str, metrics: dict[str, float]) -> None:
        self._check_names(metrics)
        self._scratch.note({"point": key, "metrics": metrics})
        self._known[key] = metrics

    def _check_names(self, metrics: Metrics) -> None:
        self._names = self._names or set(metrics)
        if self._names != set(metrics):
            raise ModelError(
                f"the evaluation returned {', '.join(sorted(metrics))} at one point, and "
                f"{', '.join(sorted(self._names))} at another: expected the same metrics everywhere"
            )


def _room(model: nn.Module, memory_budget_bytes: int) -> int:
    """Return how many copies of a model there is room for."""
    state = [one for one in model.state_dict().values() if isinstance(one, torch.Tensor)]
    nbytes = max(sum(one.nbytes for one in state), 1)
    device = device_of(model)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // _SHARE_OF_DEVICE // nbytes
    return memory_budget_bytes // nbytes
