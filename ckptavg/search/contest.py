"""Who is best: averages and single checkpoints, each judged by the user's evaluation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ckptavg.bn_pass import BnOutcome
from ckptavg.checkpoint import Checkpoint
from ckptavg.eval_command import EvalCommand
from ckptavg.evaluation_log import EvaluationLog
from ckptavg.live_model import check_repeatable
from ckptavg.metrics import Judge
from ckptavg.output import OutputDirectory
from ckptavg.prepare import Prepared
from ckptavg.processes import Processes
from ckptavg.results import BnPass, Progress, SweepRow
from ckptavg.steps import add_indexes, complete, put_statistics, recompute_statistics, stage_of

Metrics = Mapping[str, float]
ByCommand = Callable[[Checkpoint, BnPass], Metrics]


@dataclass(kw_only=True)
class Contest:
    """Judges the outputs of a plan, and as controls the checkpoints they are made of.

    Every method is called by all processes together.

    Attributes:
        evaluation: Who judges.
        prepared: What is judged.
        processes: Who shares the work.
        judge: What decides.
        progress: As in ``average_checkpoints``.
        by_command: Judges a single checkpoint by a command.
        judged: Told number and metrics of each average as soon as it is judged.
        log: What was judged already.
        names: Of the averages.
        averages: What was said of them, by name.
        controls: What was said of checkpoints.
    """

    evaluation: BnPass
    prepared: Prepared
    processes: Processes
    judge: Judge
    progress: Progress | None
    by_command: ByCommand
    judged: Callable[[int, Metrics], None] = lambda number, metrics: None
    log: EvaluationLog = field(default_factory=EvaluationLog)
    names: list[str] = field(init=False)
    averages: dict[str, Metrics] = field(default_factory=dict)
    controls: list[SweepRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        plan = self.prepared.plan
        self.names = [one.name or str(one.scheme) for one in plan.outputs]
        self._outcomes: list[BnOutcome | None] = [None] * len(self.names)
        self._has_pass = self.evaluation.batches is not None
        if self._has_pass:
            check_repeatable(self.evaluation, len(self.names) + plan.n_checkpoints)

    # -- judging

    def judge_checkpoint(self, checkpoint: Checkpoint, kind: Literal["last", "single"]) -> None:
        """Judge a checkpoint by itself: as it is stored, and with a BatchNorm pass of its own.

        Raises:
            ModelError: If the evaluation fails.
            UsageError: If it is not clear which metric decides.
        """
        for bn_pass in (False, True) if self._has_pass else (False,):
            self.controls.append(
                SweepRow(
                    name=checkpoint.label,
                    kind=kind,
                    scheme=None,
                    n_checkpoints=1,
                    bn_pass=bn_pass,
                    metrics=self._metrics_of(checkpoint, bn_pass=bn_pass),
                )
            )

    def _metrics_of(self, checkpoint: Checkpoint, *, bn_pass: bool) -> Metrics:
        live, evaluation = self.prepared.live, self.evaluation
        what = f"{checkpoint.label}{' + BN pass' if bn_pass else ''}"

        def metrics() -> Metrics:
            if isinstance(evaluation.evaluate, EvalCommand):
                alone = evaluation if bn_pass else BnPass(evaluate=evaluation.evaluate)
                return self._by_first(lambda: dict(self.by_command(checkpoint, alone)))
            if live is None:
                raise AssertionError("a function judges a model")
            live.load(checkpoint)
            if bn_pass:
                live.recompute(self._report("batchnorm"))
            return live.evaluated(what) or {}

        return self._known_or(what, metrics)

    def judge_averages(self, directory: OutputDirectory) -> None:
        """Judge all that was written.

        Raises:
            ModelError: If the evaluation fails.
        """
        command = self.evaluation.evaluate
        if isinstance(command, EvalCommand):  # it sees files: statistics go into them before
            self._outcomes = recompute_statistics(
                self.processes, self.prepared, directory, self.evaluation, self.progress
            )
            self._complete(directory, range(len(self.names)))
        else:
            self.processes.first(lambda: add_indexes(directory))
        for number, name in enumerate(self.names):

            def metrics(number: int = number) -> Metrics:
                if isinstance(command, EvalCommand):
                    model = directory.models[number]
                    return self._by_first(lambda: command.evaluated(model.directory))
                outcome = self._outcomes[number] = self._outcome(number, directory)
                return outcome.metrics or {}

            self.averages[name] = self._known_or(f"average {name}", metrics)
            self.judged(number, self.averages[name])

    def settle(self, kept: Sequence[int], directory: OutputDirectory) -> list[BnOutcome]:
        """Complete the outputs that are kept: their BatchNorm statistics go into the files.

        Returns:
            What became of each output of the plan.
        """
        if not isinstance(self.evaluation.evaluate, EvalCommand):
            for number in kept:
                if self._has_pass and self._outcomes[number] is None:  # judged by an earlier run
                    self._outcomes[number] = self._outcome(number, directory)

            wanted = [one if at in kept else None for at, one in enumerate(self._outcomes)]
            self.processes.first(lambda: put_statistics(directory, wanted))
            self._complete(directory, kept)
        return [
            replace(outcome or BnOutcome(statistics=[], metrics=None), metrics=self.averages[name])
            for name, outcome in zip(self.names, self._outcomes, strict=True)
        ]

    def _complete(self, directory: OutputDirectory, numbers: Sequence[int]) -> None:
        def work() -> None:
            for number in numbers:
                complete(self.prepared, directory, number)

        self.processes.first(work)

    def _outcome(self, number: int, directory: OutputDirectory) -> BnOutcome:
        run = self.prepared.run_bn_pass
        if run is None:
            raise AssertionError("a function judges a model")
        label = str(directory.output / self.names[number])
        return run(number, directory.models[number].directory, label, self._report)

    def _report(self, stage: str) -> Callable[[int], None]:
        return stage_of(self.progress, stage, self.evaluation.max_samples)

    def _known_or(self, what: str, judge: Callable[[], Metrics]) -> Metrics:
        known = self.log.get(what)
        metrics = judge() if known is None else known
        self.judge.value(metrics)  # it is there
        if known is None:
            self.log.add(what, metrics)
        return metrics

    def _by_first(self, judge: Callable[[], dict[str, float]]) -> Metrics:
        """Let the first process judge, and tell all."""
        return self.processes.together(lambda: judge() if self.processes.rank == 0 else {})[0]

    # -- comparing

    @property
    def best(self) -> int:
        """Number of the best average; of equals the first."""
        return self.names.index(self.judge.best(self.averages))

    def rows(self) -> tuple[SweepRow, ...]:
        """Return the averages, best first, then the checkpoints."""
        by_name = dict(zip(self.names, self.prepared.plan.outputs, strict=True))
        averages = [
            SweepRow(
                name=name,
                kind="average",
                scheme=str(by_name[name].scheme),
                n_checkpoints=len(by_name[name].row.used),
                bn_pass=self._has_pass,
                metrics=self.averages[name],
            )
            for name in self.judge.ranked(self.averages)
        ]
        return (*averages, *self.controls)
