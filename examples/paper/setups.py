"""What is trained on what: the sizes, the schedules' numbers, and the two versions of MNIST-1D.

The network is the one of ``mnist1d_resnet.py``, one folder up. The data differ from that file's in
one number: the *clean* set-up has twice the noise in its signals, because with little of it plain
SGD leaves nothing to win.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.append(str(Path(__file__).resolve().parent.parent))

from mnist1d.data import get_dataset_args, make_dataset
from mnist1d_resnet import N_CLASSES, Mnist1d, ResNet1d

N_VALIDATION = 1000  # decides nothing here; ``sweep`` names a best average by it
BN_BATCH_SIZE = 500
SEED_OF_LABELS = 99  # plus the run's seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Data, network and training of all arms.

    Attributes:
        name: What files and tables call it.
        corr_noise: Scale of the correlated noise in the signals; mnist1d's default is 0.25.
        redrawn_labels: Share of the training labels that are redrawn; one in ten of them is right.
        budget_epochs: Length of the conventional run ("1 budget"), a multiple of 8.
        width: Of the network; 8 has 3,826 parameters.
        n_train: Signals to learn.
        n_test: Signals to test with.
    """

    name: str
    corr_noise: float
    redrawn_labels: float
    budget_epochs: int = 24
    width: int = 8
    n_train: int = 4000
    n_test: int = 4000

    def epochs(self, budgets: float) -> int:
        """Return the length of so many budgets."""
        return int(budgets * self.budget_epochs)


CLEAN = Setup(name="clean", corr_noise=0.5, redrawn_labels=0.0)
NOISY = Setup(name="noisy", corr_noise=0.25, redrawn_labels=0.2)


@cache
def load(setup: Setup, seed: int, device: str) -> Mnist1d:
    """Generate the data; the same for every seed, but for redrawn labels.

    Generating seeds the global random number generators of Python and NumPy.
    """
    arguments = get_dataset_args()
    n_held_out = N_VALIDATION + setup.n_test
    arguments.num_samples = setup.n_train + n_held_out
    # mnist1d truncates num_samples * train_split to an integer; the half keeps that exact.
    arguments.train_split = (setup.n_train + 0.5) / arguments.num_samples
    arguments.corr_noise_scale = setup.corr_noise
    generated = make_dataset(arguments)
    signals, digits = _tensors(generated["x"], generated["y"])
    held_out_signals, held_out_digits = _tensors(generated["x_test"], generated["y_test"])
    digits = redraw(digits, setup.redrawn_labels, seed)
    return Mnist1d(
        train_signals=signals.to(device),
        train_digits=digits.to(device),
        validation_signals=held_out_signals[:N_VALIDATION].to(device),
        validation_digits=held_out_digits[:N_VALIDATION].to(device),
        test_signals=held_out_signals[N_VALIDATION:].to(device),
        test_digits=held_out_digits[N_VALIDATION:].to(device),
    )


def redraw(digits: Tensor, share: float, seed: int) -> Tensor:
    """Return labels of which a share, chosen by chance, is replaced by random ones."""
    random = torch.Generator().manual_seed(SEED_OF_LABELS + seed)
    is_redrawn = torch.rand(len(digits), generator=random) < share
    drawn = torch.randint(N_CLASSES, digits.shape, generator=random)
    return torch.where(is_redrawn, drawn, digits)


def build(setup: Setup) -> ResNet1d:
    """Build the network; its initial weights follow torch's global seed."""
    return ResNet1d(setup.width)


def train_batches(setup: Setup, seed: int, device: str) -> Sequence[Tensor]:
    """Return the training signals in large batches, for BatchNorm passes."""
    return torch.split(load(setup, seed, device).train_signals, BN_BATCH_SIZE)


def labelled_batches(
    setup: Setup, seed: int, device: str, part: str
) -> Sequence[tuple[Tensor, Tensor]]:
    """Return signals and digits of the part ``train``, ``validation`` or ``test``."""
    data = load(setup, seed, device)
    signals, digits = getattr(data, f"{part}_signals"), getattr(data, f"{part}_digits")
    return list(zip(signals.split(BN_BATCH_SIZE), digits.split(BN_BATCH_SIZE), strict=True))


def scores(setup: Setup, seed: int, device: str, model: nn.Module) -> dict[str, float]:
    """Judge a model: accuracy in percent and mean negative log-likelihood in nats."""
    data = load(setup, seed, device)
    validation = model(data.validation_signals).argmax(dim=1) == data.validation_digits
    logits = model(data.test_signals)
    return {
        "validation_accuracy": 100 * validation.double().mean().item(),
        "accuracy": accuracy(logits, data.test_digits),
        "nll": functional.cross_entropy(logits, data.test_digits).item(),
    }


def accuracy(logits: Tensor, digits: Tensor) -> float:
    """Return how many percent are right."""
    return 100 * (logits.argmax(dim=1) == digits).double().mean().item()


def _tensors(signals: object, digits: object) -> tuple[Tensor, Tensor]:
    return torch.tensor(signals, dtype=torch.float32)[:, None], torch.tensor(digits)
