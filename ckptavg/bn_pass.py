"""The BatchNorm pass on an average that is written but not yet published, and what it brought."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ckptavg.batchnorm import BnReport, recompute_together, unwrapped
from ckptavg.checkpoint import Checkpoint, open_checkpoint
from ckptavg.errors import CkptavgError, ModelError, UsageError
from ckptavg.evaluate import evaluated
from ckptavg.model import NameFit, bn_buffer_bytes, check_names, load_weights
from ckptavg.model_zoo import ModelFromConfig
from ckptavg.plan import AveragePlan
from ckptavg.processes import Processes
from ckptavg.results import BnPass, ComparisonRow

Report = Callable[[int], None]
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True, kw_only=True)
class BnOutcome:
    """What the pass on one average gave.

    Attributes:
        report: What it did.
        statistics: Names and bytes to put into the written files.
        metrics: What the evaluation says of the model with them; None without one.
        comparison: What it says of other combinations.
    """

    report: BnReport
    statistics: list[tuple[str, bytes]]
    metrics: Mapping[str, float] | None
    comparison: tuple[ComparisonRow, ...]


@dataclass(frozen=True)
class LastCheckpoint:
    """What was found of a checkpoint that averages are compared with."""

    rows: tuple[ComparisonRow, ...]
    statistics: Mapping[str, Tensor]


def build_model(batchnorm: BnPass, checkpoint: Checkpoint, device: str) -> nn.Module:
    """Build the user's model and check that the average will fit it, before anything is read."""
    model = batchnorm.model
    if not isinstance(model, nn.Module):
        build = model
        if isinstance(model, ModelFromConfig):
            build = partial(model.build, _directory(checkpoint))
        with _user_code("building the model"), _on_device(device):
            model = build()  # type: ignore[operator]  # ModelFromConfig is gone
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is a {type(model).__name__}, expected a torch.nn.Module")
    if not callable(batchnorm.batches):
        _refuse_other_than_batches(batchnorm.batches)
    model = unwrapped(model)
    with _user_code("preparing the model"):
        check_names(model, checkpoint.tensors, checkpoint.label)
        return model.to(device)


def _directory(checkpoint: Checkpoint) -> str | None:
    return None if checkpoint.folder is None else str(checkpoint.folder.local_directory())


def check_repeatable(batchnorm: BnPass, n_passes: int) -> None:
    """Refuse data that can be gone through only once, where several passes need it.

    Raises:
        UsageError: If so.
    """
    batches = batchnorm.batches
    if n_passes > 1 and isinstance(batches, Iterator):
        raise UsageError(
            f"the data is a {type(batches).__name__}, which can be gone through only once, and "
            f"there are {n_passes} passes to make: give a function that returns it"
        )


def recompute_written(
    model: nn.Module,
    batchnorm: BnPass,
    plan: AveragePlan,
    written: Path,
    label: str,
    last: Checkpoint | None,
    known: dict[str, LastCheckpoint],
    progress: Callable[[str], Report],
    processes: Processes,
) -> BnOutcome:
    """Load an average that was just written into the model, run the pass, and evaluate it.

    Args:
        model: From ``build_model``.
        batchnorm: What was asked for.
        plan: What was averaged.
        written: The directory of the average.
        label: What messages call it.
        last: The checkpoint to compare with; None if there is none.
        known: What was found of such checkpoints for other outputs; added to.
        progress: Gives what reports the samples of a stage.
        processes: Who shares the pass.
    """
    rows: list[ComparisonRow] = []
    # what was averaged before is a single model here, whose statistics may be of any kind
    stored = "averaged" if plan.n_checkpoints > 1 else "as stored"
    what = "as stored" if plan.n_checkpoints == 1 and last is None else "average"

    def load(checkpoint: Checkpoint) -> NameFit:
        fits = []
        with _user_code(f"loading {checkpoint.label} into the model"):
            processes.together(lambda: fits.append(load_weights(model, checkpoint)))
        return fits[0]

    def evaluate(name: str) -> None:
        function = batchnorm.evaluate
        if function is None:
            return

        def metrics_of_first() -> dict[str, float] | None:
            if processes.rank != 0:
                return None
            with _on_device_of(model):
                return evaluated(model, function)

        with _user_code(f"evaluating '{name}'"):
            metrics = processes.together(metrics_of_first)[0]
        rows.append(ComparisonRow(name=name, metrics=metrics or {}))

    last_statistics: Mapping[str, Tensor] = {}
    if batchnorm.compare and last is not None:
        if last.label not in known:
            load(last)
            last_statistics = _statistics_of(model)
            evaluate("last checkpoint")
            load(last)  # an evaluation may have changed it
            _run(model, batchnorm, progress("batchnorm of the last checkpoint"), processes)
            evaluate("last checkpoint + BN pass")
            known[last.label] = LastCheckpoint(tuple(rows), last_statistics)
        rows[:], last_statistics = known[last.label].rows, known[last.label].statistics
    averaged = open_checkpoint(written, label=label)
    try:
        fit = load(averaged)
        if batchnorm.compare and last_statistics:
            _set_statistics(model, last_statistics)
            evaluate("average, BN statistics of the last")
            load(averaged)
        if batchnorm.compare:
            evaluate(f"average, BN statistics {stored}" if what == "average" else what)
            load(averaged)
    finally:
        averaged.close()
    report = _run(model, batchnorm, progress("batchnorm"), processes)
    dtypes = {tensor.name: tensor.output_dtype.name for tensor in plan.tensors}
    statistics = list(bn_buffer_bytes(model, report, dtypes, fit))
    evaluate(f"{what} + BN pass")
    return BnOutcome(
        report=report,
        statistics=statistics,
        metrics=rows[-1].metrics if rows else None,
        comparison=tuple(rows) if batchnorm.compare else (),
    )


def _run(model: nn.Module, batchnorm: BnPass, progress: Report, processes: Processes) -> BnReport:
    def batches() -> Iterable[Any]:
        found = batchnorm.batches
        if callable(found) and not isinstance(found, Iterable):
            found = found()
        _refuse_other_than_batches(found)
        return found

    with _user_code("the BatchNorm pass"), _on_device_of(model):
        return recompute_together(model, batches, batchnorm, processes=processes, progress=progress)


def _on_device_of(model: nn.Module) -> AbstractContextManager[object]:
    return _on_device(next((str(tensor.device) for tensor in model.parameters()), "cpu"))


def _on_device(device: str) -> AbstractContextManager[object]:
    """Let what user code puts on "cuda" go where the model is."""
    found = torch.device(device)
    return torch.cuda.device(found) if found.type == "cuda" else nullcontext()


def _statistics_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: buffer.clone()
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] in _STATISTICS
    }


def _set_statistics(model: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if name in statistics:
            buffer.copy_(statistics[name])


def _refuse_other_than_batches(batches: object) -> None:
    if not isinstance(batches, Iterable):
        raise ModelError(f"the data is a {type(batches).__name__}, expected an iterable of batches")


@contextmanager
def _user_code(doing: str) -> Iterator[None]:
    """Turn what the user's model, data or forward raise into one error; the cause is kept."""
    try:
        yield
    except CkptavgError:
        raise
    except (Exception, SystemExit) as error:  # sys.exit() in it must not end ckptavg
        raise ModelError(f"{doing} failed: {type(error).__name__}: {error}") from error
