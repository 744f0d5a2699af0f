"""The BatchNorm pass on an average that is written but not yet published."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from ckptavg.batchnorm import BnReport, recompute_bn_stats
from ckptavg.checkpoint import Checkpoint, open_checkpoint
from ckptavg.errors import CkptavgError, ModelError, UsageError
from ckptavg.model import bn_buffer_bytes, check_names, load_weights
from ckptavg.plan import AveragePlan
from ckptavg.results import BnPass


def build_model(batchnorm: BnPass, checkpoint: Checkpoint, device: str) -> nn.Module:
    """Build the user's model and check that the average will fit it, before anything is read."""
    model = batchnorm.model
    if not isinstance(model, nn.Module):
        with _user_code("building the model"):
            model = model()
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is a {type(model).__name__}, expected a torch.nn.Module")
    if not callable(batchnorm.batches):
        _refuse_other_than_batches(batchnorm.batches)
    with _user_code("preparing the model"):
        check_names(model, checkpoint.tensors, checkpoint.label)
        return model.to(device)


def check_repeatable(batchnorm: BnPass, n_outputs: int) -> None:
    """Refuse data that can be gone through only once, where several models need it.

    Raises:
        UsageError: If so.
    """
    batches = batchnorm.batches
    if n_outputs > 1 and not callable(batches) and iter(batches) is batches:
        raise UsageError(
            f"the data is a {type(batches).__name__}, which can be gone through only once, and "
            f"there are {n_outputs} averages: give a function that returns it"
        )


def recompute_written(
    model: nn.Module,
    batchnorm: BnPass,
    plan: AveragePlan,
    written: Path,
    label: str,
    progress: Callable[[int], None],
) -> tuple[BnReport, list[tuple[str, bytes]]]:
    """Load an average that was just written into the model, and run the pass.

    Returns:
        The report, and the names and bytes of the statistics to put into the written files.
    """
    averaged = open_checkpoint(written, label=label)
    try:
        with _user_code("loading the average into the model"):
            load_weights(model, averaged)
    finally:
        averaged.close()
    batches = batchnorm.batches
    with _user_code("the BatchNorm pass"):
        if callable(batches) and not isinstance(batches, Iterable):
            batches = batches()
        _refuse_other_than_batches(batches)
        report = recompute_bn_stats(
            model,
            batches,
            forward=batchnorm.forward,
            max_batches=batchnorm.max_batches,
            max_samples=batchnorm.max_samples,
            progress=progress,
        )
    dtypes = {tensor.name: tensor.output_dtype.name for tensor in plan.tensors}
    return report, list(bn_buffer_bytes(model, report, dtypes))


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
