"""Quick start: train a small network, average its checkpoints with ckptavg, see what it brings.

Run it from anywhere, in an environment with ckptavg and mnist1d; it takes about a minute::

    python quickstart.py

1. **Train** a 1-D ResNet with BatchNorm (BN) on MNIST-1D, a fifth of whose training labels are
   redrawn at random. The learning rate stays at 0.05 from beginning to end, and every epoch saves
   an ordinary checkpoint with ``torch.save``.
2. **Average** the checkpoints of the second half: Stochastic Weight Averaging (SWA), after the
   fact. The commands are printed as you would type them.
3. **Compare** the averaged model with the checkpoints it is made of, on 4,000 test signals.
4. **Check** what was written: weights to the last bit, BN statistics against a direct computation.

Why BN needs care: a BN layer normalises with a mean and a variance measured while its own
checkpoint was trained. The averaged weights produce other activations, so ckptavg runs the training
inputs through the averaged model once and measures anew: the *BN pass*. That pass improves a single
checkpoint as well, so the table has a row for it: averaging gets no credit for the BN pass.

The last checkpoint is a weak opponent on purpose: with a learning rate that never falls, the
weights keep bouncing around a good place without settling in it. Averaging finds the middle without
a second, decayed run. Where the learning rate did fall to zero, expect a smaller gain.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from mnist1d_resnet import N_CLASSES, Mnist1d, build, load_mnist1d
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

LEARNING_RATE = 0.05
BATCH_SIZE = 100
REDRAWN_LABELS = 0.2  # share of the training labels; one in ten of them is right by chance
GAIN_TO_REACH = 3.0  # points of test accuracy, SWA + BN pass over the last checkpoint

EXAMPLES_DIR = Path(__file__).resolve().parent
MODEL_AND_BATCHES = ["--model", "mnist1d_resnet:build", "--data", "mnist1d_resnet:train_batches"]

StateDict = Mapping[str, Tensor]


class Score(NamedTuple):
    """Quality on the test set.

    Attributes:
        accuracy: Percent of the test signals whose digit is recognised.
        nll: Mean negative log-likelihood of the right digit, in nats; lower is better.
    """

    accuracy: float
    nll: float


def main() -> None:
    """Train, average, compare, check."""
    arguments = parse_arguments()
    work_dir: Path = arguments.work_dir.resolve()
    dataset = load_mnist1d()

    # 1. Train. Afterwards there are only files, as after any training run.
    checkpoint_paths = train(
        dataset, work_dir / "runs" / "mnist1d", n_epochs=arguments.epochs, seed=arguments.seed
    )

    # 2. Average. The second half starts at 140/300 of the run, as in the SWA paper's experiment
    #    with one fixed learning rate.
    averaged_paths = checkpoint_paths[arguments.epochs * 140 // 300 :]
    last_path = averaged_paths[-1]
    swa_dir, no_bn_pass_dir, last_bn_dir = (
        work_dir / name for name in ("swa", "swa-no-bn-pass", "last-bn")
    )
    if Path.cwd() != EXAMPLES_DIR:
        print(f"\n$ cd {shlex.quote(shortest(EXAMPLES_DIR, seen_from=Path.cwd()))}")
    run_ckptavg("average", averaged_paths, output_dir=swa_dir, options=MODEL_AND_BATCHES)
    # Without a model there is no BN pass: BN statistics are averaged just like the weights.
    run_ckptavg("average", averaged_paths, output_dir=no_bn_pass_dir)
    # The control: a BN pass for the last checkpoint alone.
    run_ckptavg("recompute-bn", [last_path], output_dir=last_bn_dir, options=MODEL_AND_BATCHES)

    # 3. Compare.
    checkpoints: list[StateDict] = [read_checkpoint(path) for path in averaged_paths]
    last = checkpoints[-1]
    last_bn = load_file(last_bn_dir / "model.safetensors")
    swa = load_file(swa_dir / "model.safetensors")
    swa_averaged_bn = load_file(no_bn_pass_dir / "model.safetensors")
    swa_last_bn = {**swa_averaged_bn, **{name: last[name] for name in bn_statistics_names()}}

    singles = [evaluate(checkpoint, dataset) for checkpoint in checkpoints]
    last_score, last_bn_score = evaluate(last, dataset), evaluate(last_bn, dataset)
    swa_score = evaluate(swa, dataset)
    n_averaged = len(checkpoints)
    print_table(
        {
            "last checkpoint": last_score,
            "last checkpoint + BN pass": last_bn_score,
            f"best of the {n_averaged} checkpoints (picked on the test set)": max(
                singles, key=lambda single: single.accuracy
            ),
            f"mean of the {n_averaged} checkpoints": Score(
                accuracy=fmean(single.accuracy for single in singles),
                nll=fmean(single.nll for single in singles),
            ),
            "SWA, no BN pass, BN statistics of the last": evaluate(swa_last_bn, dataset),
            "SWA, no BN pass, BN statistics averaged": evaluate(swa_averaged_bn, dataset),
            "SWA + BN pass": swa_score,
        }
    )

    # 4. Check.
    check_weights(swa, checkpoints)
    check_first_bn_layer(swa, dataset)

    gain = swa_score.accuracy - last_score.accuracy
    if gain < GAIN_TO_REACH:
        raise SystemExit(
            f"SWA + BN pass: {gain:+.2f} points against the last checkpoint, "
            f"expected at least {GAIN_TO_REACH:+.2f}"
        )
    print(
        "\nRemember: average late checkpoints, then recompute BN statistics: "
        f"{gain:+.1f} points over the last checkpoint "
        f"({swa_score.accuracy - last_bn_score.accuracy:+.1f} over last + BN pass)."
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line; the defaults are what the figures in the documentation come from."""
    parser = argparse.ArgumentParser(description="Train, average with ckptavg, compare, check.")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("quickstart-output"),
        help="folder for checkpoints and averaged models (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=int, default=36, help="epochs to train (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of initial weights, wrong labels and batch order (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error("--epochs: at least 2 are needed to average anything")
    return arguments


# --- 1. Train ---------------------------------------------------------------------------------


def train(dataset: Mnist1d, run_dir: Path, *, n_epochs: int, seed: int) -> list[Path]:
    """Train from scratch at a fixed learning rate and save one checkpoint an epoch.

    Returns:
        The checkpoints' paths, oldest first.
    """
    torch.manual_seed(seed)
    run_dir.mkdir(parents=True, exist_ok=True)
    model = build()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4
    )
    signals, digits = dataset.train_signals, redraw_labels(dataset.train_digits)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"training {n_parameters:,} parameters for {n_epochs} epochs, seed {seed}")

    checkpoint_paths = []
    for epoch in range(1, n_epochs + 1):
        model.train()
        losses = []
        for batch in torch.split(torch.randperm(len(digits)), BATCH_SIZE):
            loss = functional.cross_entropy(model(signals[batch]), digits[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            losses.append(loss.item())

        path = run_dir / f"epoch-{epoch:03d}.pt"
        torch.save(
            {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, path
        )
        checkpoint_paths.append(path)
        if epoch % 6 == 0 or epoch == n_epochs:
            print(f"  epoch {epoch:3d}: training loss {fmean(losses):.3f}", flush=True)
    return checkpoint_paths


def redraw_labels(digits: Tensor) -> Tensor:
    """Return a copy in which every fifth label, by chance, is replaced by a random one."""
    is_redrawn = torch.rand(len(digits)) < REDRAWN_LABELS
    return torch.where(is_redrawn, torch.randint(N_CLASSES, digits.shape), digits)


# --- 2. Average -------------------------------------------------------------------------------


def run_ckptavg(
    command: str, checkpoint_paths: Sequence[Path], *, output_dir: Path, options: Sequence[str] = ()
) -> None:
    """Print a ckptavg command as a user would type it, then run it.

    It runs in the folder of this file, because ``--model`` and ``--data`` import
    ``mnist1d_resnet`` from the current directory.

    Raises:
        SystemExit: If the command fails; it has said why.
    """
    run_dir = shortest(checkpoint_paths[0].parent, seen_from=EXAMPLES_DIR)
    output = shortest(output_dir, seen_from=EXAMPLES_DIR)
    file_names = [path.name for path in checkpoint_paths]
    output_options = ["-o", output, "--overwrite"]

    typed = [f"ckptavg {command} {shlex.quote(run_dir)}/{brace_pattern(file_names)}"]
    typed += [shlex.join(group) for group in (output_options, options) if group]
    print("\n$ " + " \\\n    ".join(typed), flush=True)
    sources = [str(Path(run_dir, file_name)) for file_name in file_names]
    completed = subprocess.run(
        [sys.executable, "-m", "ckptavg", command, *sources, *output_options, *options],
        cwd=EXAMPLES_DIR,
        check=False,
    )
    if completed.returncode != 0:
        raise SystemExit(f"ckptavg {command}: failed with exit code {completed.returncode}")


def brace_pattern(file_names: Sequence[str]) -> str:
    """Abbreviate file names ``epoch-017.pt``, ... as shells do: ``epoch-{017..036}.pt``."""
    first, last = Path(file_names[0]), Path(file_names[-1])
    if first == last:
        return first.name
    prefix, _, first_number = first.stem.rpartition("-")
    last_number = last.stem.rpartition("-")[2]
    return f"{prefix}-{{{first_number}..{last_number}}}{first.suffix}"


def shortest(path: Path, *, seen_from: Path) -> str:
    """Spell a path relative to a folder or absolute, whichever is shorter."""
    return min(os.path.relpath(path, seen_from), str(path), key=len)


# --- 3. Compare -------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> StateDict:
    """Read the model's state dict from a checkpoint that ``train`` saved."""
    checkpoint: dict[str, StateDict] = torch.load(path, weights_only=True)
    return checkpoint["model"]


def bn_statistics_names() -> list[str]:
    """List the buffers in which the model's BN layers keep what they measured."""
    return [name for name, _ in build().named_buffers()]


@torch.no_grad()
def evaluate(state_dict: StateDict, dataset: Mnist1d) -> Score:
    """Measure a state dict on the test set; every tensor of the model must be in it."""
    model = build()
    model.load_state_dict(state_dict, strict=True)
    model.eval()
    logits = model(dataset.test_signals)
    is_right = logits.argmax(dim=1) == dataset.test_digits
    nll = functional.cross_entropy(logits, dataset.test_digits)
    return Score(accuracy=100 * is_right.double().mean().item(), nll=nll.item())


def print_table(score_of: Mapping[str, Score]) -> None:
    """Print one row a model, in the order given."""
    print(f"\n{'on the test set':<56}{'accuracy %':>11}{'NLL':>8}")
    for row, score in score_of.items():
        print(f"{row:<56}{score.accuracy:>11.2f}{score.nll:>8.3f}")


# --- 4. Check ---------------------------------------------------------------------------------


def check_weights(swa: StateDict, checkpoints: Sequence[StateDict]) -> None:
    """Check that every weight is the exact mean of the checkpoints, rounded once to float32.

    Raises:
        SystemExit: If a single bit differs.
    """
    for name, _ in build().named_parameters():
        stacked = torch.stack([checkpoint[name].double() for checkpoint in checkpoints])
        expected = stacked.mean(dim=0).float()
        if not torch.equal(swa[name], expected):
            n_wrong = int((swa[name] != expected).sum())
            raise SystemExit(
                f"{name}: {n_wrong} of {expected.numel()} weights differ from the mean of "
                f"{len(checkpoints)} checkpoints"
            )
    print("\nchecked: every weight is the float64 mean of the checkpoints, to the last bit")


@torch.no_grad()
def check_first_bn_layer(swa: StateDict, dataset: Mnist1d) -> None:
    """Check the first BN layer against statistics of the whole training set, taken at once.

    Raises:
        SystemExit: If a mean or a variance is off by more than float32 arithmetic explains.
    """
    model = build()
    model.load_state_dict(swa, strict=True)
    activations = model.stem(dataset.train_signals).double()  # the first BN layer's inputs
    # BatchNorm stores the unbiased variance, which is also torch.var_mean's default.
    variance, mean = torch.var_mean(activations, dim=(0, 2))
    # Means may be near zero, so the standard deviation sets the scale of what is an error.
    deviation_of = {
        "running_mean": (swa["blocks.0.norm1.running_mean"] - mean).abs() / variance.sqrt(),
        "running_var": (swa["blocks.0.norm1.running_var"] - variance).abs() / variance,
    }
    tolerance = 1e-6
    for name, deviation in deviation_of.items():
        worst = deviation.max().item()
        if not worst <= tolerance:  # "not <=" also catches NaN
            raise SystemExit(
                f"blocks.0.norm1.{name}: relative deviation {worst:.1e} from a direct computation "
                f"over the training set, expected at most {tolerance:.0e}"
            )
    print("checked: the first BN layer's statistics are those of the whole training set")


if __name__ == "__main__":
    main()
