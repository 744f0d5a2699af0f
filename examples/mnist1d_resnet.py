"""The model and the training batches of the quick start, where ``ckptavg`` can import them.

``ckptavg`` averages files without knowing what they are. Only to recompute BatchNorm (BN)
statistics, and to judge models, does it need to run one, and then it is told where to find::

    --model mnist1d_resnet:build             called without arguments, returns the model
    --data  mnist1d_resnet:train_batches     called without arguments, returns batches of inputs
    --eval  mnist1d_resnet:scores            called with a model, returns numbers by name
    --loader test=mnist1d_resnet:test_batches
                                             called without arguments, returns labelled batches

In your own project these are usually short functions around code that you already have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from mnist1d.data import get_dataset_args, make_dataset
from torch import Tensor, nn
from torch.nn import functional

# For a model this small a second thread costs more time than it saves, and one thread makes every
# run repeat bit for bit. ckptavg imports this module too, so its BN pass keeps to the same rule.
torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = False  # on a GPU, too, statistics to float32 accuracy

N_CLASSES = 10
N_TRAIN = 4000
N_TEST = 4000
N_VALIDATION = 1000  # held out for choices, such as which average; unused in the quick start
BN_BATCH_SIZE = 500  # BN statistics want large batches (128 or more), however small training's were


class ResidualBlock(nn.Module):
    """Pre-activation residual block: BN and ReLU stand before each convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm1d(in_channels)
        self.conv1 = nn.Conv1d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm1d(out_channels)
        self.conv2 = nn.Conv1d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv1d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(batch, in_channels, length)`` to ``(batch, out_channels, length / stride)``."""
        activated = functional.relu(self.norm1(features))
        skipped: Tensor = features if self.shortcut is None else self.shortcut(activated)
        residual: Tensor = self.conv2(functional.relu(self.norm2(self.conv1(activated))))
        return skipped + residual


class ResNet1d(nn.Module):
    """Small pre-activation ResNet for signals of one channel; 3,826 parameters at width 8."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(
            ResidualBlock(width, width, stride=1),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 2 * width, stride=2),
        )
        self.norm = nn.BatchNorm1d(2 * width)
        self.head = nn.Linear(2 * width, N_CLASSES)

    def forward(self, signals: Tensor) -> Tensor:
        """Map signals ``(batch, 1, length)`` to logits ``(batch, 10)``."""
        features = functional.relu(self.norm(self.blocks(self.stem(signals))))
        logits: Tensor = self.head(features.mean(dim=2))
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Mnist1d:
    """MNIST-1D, split; signals are float32 of shape ``(n, 1, 40)``, digits are int64."""

    train_signals: Tensor
    train_digits: Tensor
    validation_signals: Tensor
    validation_digits: Tensor
    test_signals: Tensor
    test_digits: Tensor


@cache
def load_mnist1d() -> Mnist1d:
    """Generate MNIST-1D: ten hand-made templates, shifted, scaled, sheared and made noisy.

    Nothing is downloaded, and the result is always the same. Generating seeds the global random
    number generators of Python and NumPy.
    """
    arguments = get_dataset_args()
    n_held_out = N_VALIDATION + N_TEST
    arguments.num_samples = N_TRAIN + n_held_out
    # mnist1d truncates num_samples * train_split to an integer; the half keeps that exact.
    arguments.train_split = (N_TRAIN + 0.5) / arguments.num_samples
    arguments.corr_noise_scale = 0.25
    generated = make_dataset(arguments)
    held_out_signals = torch.tensor(generated["x_test"], dtype=torch.float32)[:, None]
    held_out_digits = torch.tensor(generated["y_test"])
    return Mnist1d(
        train_signals=torch.tensor(generated["x"], dtype=torch.float32)[:, None],
        train_digits=torch.tensor(generated["y"]),
        validation_signals=held_out_signals[:N_VALIDATION],
        validation_digits=held_out_digits[:N_VALIDATION],
        test_signals=held_out_signals[N_VALIDATION:],
        test_digits=held_out_digits[N_VALIDATION:],
    )


def build() -> ResNet1d:
    """Build the model; its initial weights follow torch's global seed."""
    return ResNet1d()


def train_batches() -> Sequence[Tensor]:
    """Return the inputs of the whole training set in batches of 500; labels are not needed."""
    return torch.split(load_mnist1d().train_signals, BN_BATCH_SIZE)


def labelled_train_batches() -> list[tuple[Tensor, Tensor]]:
    """Return the training set as batches of signals and digits, for its loss and error."""
    dataset = load_mnist1d()
    return _labelled(dataset.train_signals, dataset.train_digits)


def validation_batches() -> list[tuple[Tensor, Tensor]]:
    """Return the validation set as batches of signals and digits."""
    dataset = load_mnist1d()
    return _labelled(dataset.validation_signals, dataset.validation_digits)


def test_batches() -> list[tuple[Tensor, Tensor]]:
    """Return the test set as batches of signals and digits."""
    dataset = load_mnist1d()
    return _labelled(dataset.test_signals, dataset.test_digits)


def _labelled(signals: Tensor, digits: Tensor) -> list[tuple[Tensor, Tensor]]:
    pieces = (torch.split(whole, BN_BATCH_SIZE) for whole in (signals, digits))
    return list(zip(*pieces, strict=True))


def scores(model: nn.Module) -> dict[str, float]:
    """Judge a model: accuracy in percent and mean negative log-likelihood in nats.

    Choose by ``validation_accuracy``; the others are measured on the test set.
    """
    dataset = load_mnist1d()
    validation = model(dataset.validation_signals).argmax(dim=1) == dataset.validation_digits
    logits = model(dataset.test_signals)
    test = logits.argmax(dim=1) == dataset.test_digits
    return {
        "validation_accuracy": 100 * validation.double().mean().item(),
        "accuracy": 100 * test.double().mean().item(),
        "nll": functional.cross_entropy(logits, dataset.test_digits).item(),
    }
