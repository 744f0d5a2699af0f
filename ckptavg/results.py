"""What the commands take and give: values for the CLI to print and for Python to read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ckptavg.bn_options import BnOptions
from ckptavg.errors import UsageError
from ckptavg.eval_command import EvalCommand
from ckptavg.sources import Source
from ckptavg.tensors import FileStamp, HubRevision, TensorInfo

if TYPE_CHECKING:  # importing torch takes longer than averaging most models
    from torch import nn

    from ckptavg.batchnorm import BnReport
    from ckptavg.derived import AdapterReport
    from ckptavg.evaluate import Evaluate
    from ckptavg.geometry import TrajectoryResult
    from ckptavg.model_zoo import ModelFromConfig

Progress = Callable[[str, int, int | None], None]  # stage, done since the last call, total


@dataclass(frozen=True, kw_only=True)
class BnPass(BnOptions):
    """What happens to an average before it is published: BatchNorm pass, evaluation, or both.

    How the pass runs, ``BnOptions`` says.

    Attributes:
        model: The module, or a function without arguments that builds it, or what
            ``ckptavg.model_from`` returns. Its weights are replaced. None where no batches and no
            function need it.
        batches: An iterable of batches, or a function without arguments that returns one; None
            makes no BatchNorm pass.
        evaluate: ``evaluate(model)`` returns a number, or several by name, for the model that is
            published; or an ``EvalCommand``, which sees its directory; None evaluates nothing.
        compare: Evaluate also what shows what the pass and what averaging brings: the last
            checkpoint, with and without a pass of its own, and the average with other statistics.
        last_checkpoint: What ``compare`` takes for the last checkpoint; None takes that of the
            average, or what the provenance of a single model names.
        names: What the section ``[model]`` of a recipe calls model, data, forward and eval, with
            the arguments of the first two, where that is known; for the provenance.

    Raises:
        UsageError: If a value makes no sense.
    """

    model: nn.Module | Callable[[], nn.Module] | ModelFromConfig | None = None
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None
    evaluate: Evaluate | EvalCommand | None = None
    compare: bool = False
    last_checkpoint: Source | None = None
    names: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        BnOptions.__post_init__(self)
        by_command = isinstance(self.evaluate, EvalCommand)
        if self.evaluate is not None and not by_command and not callable(self.evaluate):
            raise UsageError(f"evaluate is a {type(self.evaluate).__name__}, expected a function")
        if self.batches is None and self.evaluate is None:
            raise UsageError("a model is there for batches (--data) or an evaluation (--eval)")
        if self.model is None and (self.batches is not None or not by_command):
            raise UsageError("batches (--data) and evaluations (--eval) need a model (--model)")
        if self.model is not None and self.batches is None and by_command:
            raise UsageError("without batches (--data), --eval-command needs no model (--model)")
        if self.batches is None and (given := self.chosen() or self.forward):
            name = next(iter(given)) if isinstance(given, dict) else "forward"
            raise UsageError(f"{name} is for a BatchNorm pass, which needs batches (--data)")
        if self.compare and (self.evaluate is None or by_command):
            raise UsageError("compare needs a metric: evaluate (--eval)")
        if self.compare and self.batches is None:
            raise UsageError("compare needs batches (--data)")
        if self.last_checkpoint is not None and not self.compare:
            raise UsageError(
                "last_checkpoint (--last-checkpoint) belongs to compare (--compare, --compare-bn)"
            )


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """What the evaluation says of some weights with some BatchNorm statistics.

    Attributes:
        name: Such as ``last checkpoint + BN pass``.
        metrics: By name.
    """

    name: str
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class OutputResult:
    """One model that a run published.

    Attributes:
        path: Its directory.
        scheme: What was asked for, such as ``uniform:last=5``.
        coefficients: One a checkpoint, oldest first; 0 where it did not go in, None where it went
            into an order statistic.
        statistic: What was taken instead of the weighted mean, such as ``median``, or added to it;
            None for a weighted mean.
        differing: Integer and bool tensors that differed and were taken from ``taken_from``.
        taken_from: Label of the checkpoint that gave them.
        batchnorm: What the BatchNorm pass did; None without one.
        metrics: What the evaluation says of it; None without one.
        comparison: What it says of weights and statistics put together otherwise, in the order to
            read; empty unless asked for.
        adapter: How adapters were averaged, and how exactly; None for other checkpoints.
    """

    path: Path
    scheme: str
    coefficients: tuple[float | None, ...]
    differing: tuple[str, ...]
    taken_from: str
    batchnorm: BnReport | None
    metrics: Mapping[str, float] | None = None
    comparison: tuple[ComparisonRow, ...] = ()
    adapter: AdapterReport | None = None
    statistic: str | None = None


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Where the time of a run went; stages overlap, so they add up to more or less than the whole.

    Work that n threads share counts 1/n of the seconds they spent.

    Attributes:
        read_seconds: Reading checkpoints.
        arithmetic_seconds: Summing, dividing and rounding; on a GPU with what starts it.
        write_seconds: Writing outputs.
        publish_seconds: Bringing outputs to the storage, and the rename.
        bottleneck: ``reading``, ``arithmetic``, ``writing`` or ``syncing``: the longest of them.
    """

    read_seconds: float
    arithmetic_seconds: float
    write_seconds: float
    publish_seconds: float

    bottleneck: str = field(init=False)

    def __post_init__(self) -> None:
        stages = {
            "reading": self.read_seconds,
            "arithmetic": self.arithmetic_seconds,
            "writing": self.write_seconds,
            "syncing": self.publish_seconds,
        }
        object.__setattr__(self, "bottleneck", max(stages, key=stages.__getitem__))


@dataclass(frozen=True, kw_only=True)
class AverageResult:
    """What a run did.

    Attributes:
        output: The published directory: the model, or the directory of all models.
        outputs: The models in it, one a scheme.
        n_checkpoints: How many checkpoints were given.
        n_processes: How many processes shared the work.
        device: Where the arithmetic ran (of the first process).
        read_nbytes, written_nbytes: Bytes of tensor data, of all processes together.
        hub_nbytes: Bytes that the first process fetched from the Hub, lists and headers included.
        resumed_nbytes: How many of ``read_nbytes`` an interrupted run had read before.
        seconds: Wall time of everything; ``average_seconds`` of reading, averaging and writing.
        times: Where it went.
        peak_host_bytes: Largest resident memory of a process; None where it cannot be told.
        peak_device_bytes: Largest memory allocated on a CUDA device; None on a CPU.
        notes: What the user should know.
        trajectory: How the checkpoints lie to each other; None unless asked for.
    """

    output: Path
    outputs: tuple[OutputResult, ...]
    n_checkpoints: int
    n_processes: int
    device: str
    read_nbytes: int
    written_nbytes: int
    hub_nbytes: int
    resumed_nbytes: int
    seconds: float
    average_seconds: float
    times: StageTimes
    peak_host_bytes: int | None
    peak_device_bytes: int | None
    notes: tuple[str, ...]
    trajectory: TrajectoryResult | None = None


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """What a sweep found of one set of weights.

    Attributes:
        name: The average's name, or the checkpoint's label.
        kind: ``average``; ``last`` and ``single`` are checkpoints by themselves: the last one, and
            each one.
        scheme: What was averaged, such as ``uniform:last=5``; None for a checkpoint.
        n_checkpoints: How many went in.
        bn_pass: Whether the BatchNorm statistics were recomputed.
        metrics: What the evaluation says, by name.
    """

    name: str
    kind: Literal["average", "last", "single"]
    scheme: str | None
    n_checkpoints: int
    bn_pass: bool
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """Many averages, judged.

    Attributes:
        metric: What decided.
        mode: ``min`` or ``max``.
        best: Name of the best average.
        rows: The averages, best first; then the last checkpoint and all single ones.
        result: What was published: the best average, or all.
        files: The evidence, as files in the output: ``sweep.json``, ...
    """

    metric: str
    mode: Literal["min", "max"]
    best: str
    rows: tuple[SweepRow, ...]
    result: AverageResult
    files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SoupStep:
    """What became of one checkpoint when a greedy soup was made.

    Attributes:
        candidate: The checkpoint's label.
        metrics: What the evaluation says of it alone.
        mean_metrics: What it says of the mean with it; for the first one, of it alone.
        accepted: Whether it stayed.
    """

    candidate: str
    metrics: Mapping[str, float]
    mean_metrics: Mapping[str, float]
    accepted: bool


@dataclass(frozen=True, kw_only=True)
class SoupResult:
    """A greedy soup.

    Attributes:
        metric: What decided.
        mode: ``min`` or ``max``.
        steps: The checkpoints in the order in which they were tried, best first.
        result: What was published; ``read_nbytes`` counts all that was read on the way.
        files: The evidence, as files in the output: ``soup.json``, ...
    """

    metric: str
    mode: Literal["min", "max"]
    steps: tuple[SoupStep, ...]
    result: AverageResult
    files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One average that a search over coefficients tried.

    Attributes:
        coefficients: One a checkpoint, oldest first; they sum to 1.
        metrics: What the evaluation says of the average.
    """

    coefficients: tuple[float, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """The best of many averages whose coefficients were searched.

    Attributes:
        metric: What decided.
        mode: ``min`` or ``max``.
        trials: All that were tried, in order; the first is the uniform mean.
        best: The best of them.
        result: What was published: that average.
        files: The evidence, as files in the output: ``tune.json``, ...
    """

    metric: str
    mode: Literal["min", "max"]
    trials: tuple[Trial, ...]
    best: Trial
    result: AverageResult
    files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RunCheckpoint:
    """What is known of one checkpoint in a run directory.

    Attributes:
        name: The last part of its name.
        source: What names it as a source.
        layout: None if it cannot be opened.
        step, epoch: Where in training it was saved, where metadata or its name tell.
        learning_rate, metrics: What the trainer wrote of it.
        nbytes: Bytes of its weights; 0 if it cannot be opened.
        left_out: Why it is not taken when the run is averaged; None if it is.
        problem: Why it cannot be read; None if it can. One that is not left out keeps the run from
            being averaged.
    """

    name: str
    source: str
    layout: str | None
    step: int | None
    epoch: int | None
    learning_rate: float | None
    metrics: Mapping[str, float]
    nbytes: int
    left_out: str | None
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What is in a run directory: its checkpoints, oldest first.

    Attributes:
        source: The directory.
        checkpoints: In the order of training.
        has_weights: Whether the directory holds weights of its own beside them.
        notes: What a user should know, one sentence each.
    """

    source: str
    checkpoints: tuple[RunCheckpoint, ...]
    has_weights: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What the headers of one checkpoint tell; ``hub`` is its commit, where it is on the Hub."""

    source: str
    layout: str
    step: int | None
    epoch: int | None
    learning_rate: float | None
    metrics: Mapping[str, float]
    nbytes: int
    n_parameters: int
    files: tuple[FileStamp, ...]
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())
    hub: HubRevision | None = None
