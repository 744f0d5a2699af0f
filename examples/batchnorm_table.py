"""What BatchNorm (BN) statistics do to an average: the same weights, five ways to fill the buffers.

Run it in an environment with ckptavg and mnist1d; half a minute a seed::

    python batchnorm_table.py --seeds 0 1 2 3 4

For every seed it trains as ``quickstart.py`` does, averages the second half of the checkpoints, and
asks ckptavg itself for the comparison (``--compare-bn`` on the command line): the accuracy of

- the last checkpoint, as it is and after a BN pass of its own (the control: without it, averaging
  would get credit for what the pass alone does);
- the average with the BN statistics of a new model, of the last checkpoint, averaged like weights,
  and recomputed by the BN pass.

A second table shows how the three estimators of the pass differ where batches are not all alike.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev

import torch
from mnist1d_resnet import Mnist1d, build, load_mnist1d, train_batches
from quickstart import evaluate, train
from safetensors.torch import load_file
from torch import Tensor, nn

import ckptavg

INIT = "average, BN statistics of a new model"
ROWS = (
    "last checkpoint",
    "last checkpoint + BN pass",
    INIT,
    "average, BN statistics of the last",
    "average, BN statistics averaged",
    "average + BN pass",
)
ESTIMATORS = ("population", "paper", "torch")


def main() -> None:
    arguments = parse_arguments()
    dataset = load_mnist1d()
    accuracies: dict[str, list[float]] = {row: [] for row in ROWS}
    errors: dict[tuple[str, str], list[float]] = {}
    for seed in arguments.seeds:
        folder = arguments.work_dir / f"seed-{seed}"
        paths = train(dataset, folder / "run", n_epochs=arguments.epochs, seed=seed)
        averaged = paths[int(0.47 * len(paths)) :]
        for row, accuracy in compare(averaged, folder / "swa", dataset).items():
            accuracies[row].append(accuracy)
        for (loader, estimator), error in estimator_errors(folder / "swa", dataset).items():
            errors.setdefault((loader, estimator), []).append(error)

    print(f"\ntest accuracy in %, mean and standard deviation of {len(arguments.seeds)} seeds")
    for row, values in accuracies.items():
        print(f"  {row:<40}{fmean(values):>8.2f} ± {pstdev(values):.2f}")
    print(
        "\nerror of the variance in the first BN layer, in % (largest channel, mean of the seeds)"
    )
    print(f"  {'batches':<40}" + "".join(f"{name:>12}" for name in ESTIMATORS))
    for loader in dict.fromkeys(loader for loader, _ in errors):
        found = [fmean(errors[loader, estimator]) for estimator in ESTIMATORS]
        print(f"  {loader:<40}" + "".join(f"{error:>12.2g}" for error in found))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare ways to fill BN buffers of an average.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=36, help="default: %(default)s")
    parser.add_argument("--work-dir", type=Path, default=Path("batchnorm-table-output"))
    arguments = parser.parse_args()
    if arguments.epochs < 3:
        parser.error("--epochs: at least 3 are needed to average anything")
    return arguments


# --- 1. BN statistics from five places ---------------------------------------------------------


def compare(paths: Sequence[Path], output: Path, dataset: Mnist1d) -> dict[str, float]:
    """Average checkpoints with a BN pass; return the accuracy of every row."""

    def accuracy(model: nn.Module) -> float:
        return evaluate(model.state_dict(), dataset).accuracy

    result = ckptavg.average_checkpoints(
        paths,
        output,
        overwrite=True,
        batchnorm=ckptavg.BnPass(
            model=build, batches=train_batches, evaluate=accuracy, compare=True
        ),
    )
    found = {row.name: row.metrics["metric"] for row in result.outputs[0].comparison}
    fresh = dict(build().named_buffers())
    weights = load_file(output / "model.safetensors")
    return {**found, INIT: evaluate({**weights, **fresh}, dataset).accuracy}


# --- 2. Estimators on batches that are not all alike --------------------------------------------


def estimator_errors(swa: Path, dataset: Mnist1d) -> dict[tuple[str, str], float]:
    """Return how far the estimators are from the variance of all inputs together, in percent."""
    inputs = dataset.train_signals
    by_digit = inputs[dataset.train_digits.argsort(stable=True)]
    loaders: dict[str, Sequence[Tensor]] = {
        "shuffled, batches of 500": torch.split(inputs, 500),
        "shuffled, the last batch ragged": torch.split(inputs[:1002], 250),
        "shuffled, batches of 2 to 1024": torch.split(inputs[:2046], [2**n for n in range(1, 11)]),
        "sorted by digit, batches of 100": torch.split(by_digit, 100),
    }
    model = build()
    model.load_state_dict(load_file(swa / "model.safetensors"))
    first = model.get_submodule("blocks.0.norm1")
    errors = {}
    for loader, batches in loaders.items():
        with torch.no_grad():
            activations = model.stem(torch.cat(list(batches))).double()
        expected = activations.var(dim=(0, 2))
        for estimator in ESTIMATORS:
            ckptavg.recompute_bn_stats(model, batches, estimator=estimator)  # type: ignore[arg-type]
            variance = first.get_buffer("running_var")
            errors[loader, estimator] = 100 * float((variance / expected - 1).abs().max())
    return errors


if __name__ == "__main__":
    main()
