"""The user's model, alive: weights go in, the BatchNorm pass and the evaluation run on it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ckptavg.batchnorm import BnReport, recompute_together, unwrapped
from ckptavg.batchnorm.batches import refuse_used_up
from ckptavg.batchnorm.layers import find_layers
from ckptavg.checkpoint import Checkpoint, open_checkpoint
from ckptavg.errors import CkptavgError, ModelError, UsageError
from ckptavg.eval_command import EvalCommand
from ckptavg.evaluate import evaluated
from ckptavg.model import NameFit, bn_buffer_bytes, check_names, load_weights
from ckptavg.model_zoo import ModelFromConfig
from ckptavg.plan import AveragePlan
from ckptavg.processes import Processes
from ckptavg.results import BnPass

Report = Callable[[int], None]
_STATISTICS = ("running_mean", "running_var")


class LiveModel:
    """A model on its device, what its weights are judged by, and who shares the work.

    Every method is called by all processes together.

    Attributes:
        options: What was asked for.
        module: The model.
    """

    def __init__(
        self, batchnorm: BnPass, checkpoint: Checkpoint, device: str, processes: Processes
    ) -> None:
        """Build the user's model; see that weights like those of a checkpoint will fit it.

        Raises:
            ModelError: If it cannot be built, or does not fit.
        """
        self.options = batchnorm
        self._processes = processes
        model = batchnorm.model
        if not isinstance(model, nn.Module):
            build = model
            if isinstance(model, ModelFromConfig):
                build = partial(model.build, _directory(checkpoint))
            with user_code("building the model"), _on_device(device):
                model = build()  # type: ignore[operator, misc]  # ModelFromConfig and None are gone
        if not isinstance(model, nn.Module):
            raise ModelError(f"the model is a {type(model).__name__}, expected a torch.nn.Module")
        if batchnorm.batches is not None and not callable(batchnorm.batches):
            _refuse_other_than_batches(batchnorm.batches)
        self.module = unwrapped(model)
        with user_code("preparing the model"):
            self.check(checkpoint)
            self.module.to(device)

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint whose weights do not fit.

        Raises:
            ModelError: If so.
        """
        check_names(self.module, checkpoint.tensors, checkpoint.label)

    def load(self, checkpoint: Checkpoint) -> NameFit:
        """Load all weights of a checkpoint.

        Raises:
            ModelError: If they do not fit.
            CheckpointError: If they cannot be read.
        """
        fits = []
        with user_code(f"loading {checkpoint.label} into the model"):
            self._processes.together(lambda: fits.append(load_weights(self.module, checkpoint)))
        return fits[0]

    def load_written(self, directory: Path, label: str) -> NameFit:
        """Load a model directory that was just written; ``label`` is what messages call it."""
        checkpoint = open_checkpoint(directory, label=label)
        try:
            return self.load(checkpoint)
        finally:
            checkpoint.close()

    def evaluated(self, what: str) -> dict[str, float] | None:
        """Return the metrics of the weights that are loaded; None where a function judges none.

        An evaluation may change the model: load the weights again before anything else.

        Args:
            what: What is evaluated, for messages.

        Raises:
            ModelError: If the user's function fails, or returns no number.
        """
        function = self.options.evaluate
        if function is None or isinstance(function, EvalCommand):
            return None

        def metrics_of_first() -> dict[str, float] | None:
            if self._processes.rank != 0:
                return None
            with self.on_its_device():
                return evaluated(self.module, function)

        with user_code(f"evaluating '{what}'"):
            return self._processes.together(metrics_of_first)[0]

    def recompute(self, progress: Report) -> BnReport | None:
        """Recompute the BatchNorm statistics of the weights that are loaded; None without data.

        Raises:
            BatchNormError: If a statistic cannot be computed.
            ModelError: If the user's model or data fail.
        """
        if self.options.batches is None:
            return None
        with user_code("the BatchNorm pass"), self.on_its_device():
            return recompute_together(
                self.module,
                self.batches,
                self.options,
                processes=self._processes,
                progress=progress,
            )

    def must_recompute(self, *, of_what: str) -> bool:
        """Tell whether there are BatchNorm layers whose statistics a pass recomputes.

        Args:
            of_what: Whose the statistics of a checkpoint are not, for the message.

        Raises:
            UsageError: If there are, and no data for the pass.
        """
        layers, _ = find_layers(self.module)
        if layers and self.options.batches is None:
            raise UsageError(
                f"the model has {len(layers)} BatchNorm layers, whose statistics belong to no "
                f"{of_what}: give training data, batches (--data)"
            )
        return bool(layers)

    def statistics_bytes(
        self, report: BnReport | None, plan: AveragePlan, fit: NameFit
    ) -> list[tuple[str, bytes]]:
        """Return names and bytes of what a pass recomputed, as a plan's output stores them."""
        if report is None:
            return []
        dtypes = {tensor.name: tensor.output_dtype.name for tensor in plan.tensors}
        return list(bn_buffer_bytes(self.module, report, dtypes, fit))

    def statistics(self) -> dict[str, Tensor]:
        """Return copies of all running means and variances."""
        return {
            name: buffer.clone()
            for name, buffer in self.module.named_buffers()
            if name.rpartition(".")[2] in _STATISTICS
        }

    def set_statistics(self, statistics: Mapping[str, Tensor]) -> None:
        """Put in running means and variances."""
        for name, buffer in self.module.named_buffers():
            if name in statistics:
                buffer.copy_(statistics[name])

    def batches(self) -> Iterable[Any]:
        """Return the batches for a BatchNorm pass.

        Raises:
            ModelError: If the data is no iterable.
        """
        found = self.options.batches
        if callable(found) and not isinstance(found, Iterable):
            found = found()
        return _refuse_other_than_batches(found)

    def on_its_device(self) -> AbstractContextManager[object]:
        """Let what user code puts on "cuda" go where the model is."""
        return _on_device(next((str(one.device) for one in self.module.parameters()), "cpu"))


def check_repeatable(batchnorm: BnPass, n_passes: int) -> None:
    """Refuse data that can be gone through only once, where several passes need it.

    Raises:
        UsageError: If so.
    """
    refuse_used_up("the data", batchnorm.batches, n_passes)


def _directory(checkpoint: Checkpoint) -> str | None:
    return None if checkpoint.folder is None else str(checkpoint.folder.local_directory())


def _on_device(device: str) -> AbstractContextManager[object]:
    """Let what user code puts on "cuda" go where the model is."""
    found = torch.device(device)
    return torch.cuda.device(found) if found.type == "cuda" else nullcontext()


def _refuse_other_than_batches(batches: object) -> Iterable[Any]:
    if not isinstance(batches, Iterable):
        raise ModelError(f"the data is a {type(batches).__name__}, expected an iterable of batches")
    return batches


@contextmanager
def user_code(doing: str) -> Iterator[None]:
    """Turn what the user's model, data or forward raise into one error; the cause is kept."""
    try:
        yield
    except CkptavgError:
        raise
    except (Exception, SystemExit) as error:  # sys.exit() in it must not end ckptavg
        raise ModelError(f"{doing} failed: {type(error).__name__}: {error}") from error
