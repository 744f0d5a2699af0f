"""Which average is best? Sixteen of them from one read, each judged, for several training runs.

Run it in an environment with ckptavg and mnist1d; half a minute a seed::

    python mnist1d_sweep.py --seeds 0 1 2 3 4

For every seed it trains as ``quickstart.py`` does and calls ``ckptavg.sweep`` on the second half of
the checkpoints: every average gets a BatchNorm (BN) pass of its own and is judged on a validation
set, by which the best is chosen, and on the test set, which the table shows. On the command line::

    ckptavg sweep runs/mnist1d --last 20 -o best --scheme uniform --scheme ema:decay=0.9 ... \\
        --model mnist1d_resnet:build --data mnist1d_resnet:train_batches \\
        --eval mnist1d_resnet:scores --metric validation_accuracy

What to look for: averages over a long window tie with the uniform mean; those that look at the last
few checkpoints only (3 of them, EMA with decay 0.5, power-function EMA with sigma 0.05) lose; all
beat the last checkpoint by far, even after a BN pass of its own.
"""

import argparse
from pathlib import Path
from statistics import fmean, pstdev

from mnist1d_resnet import build, load_mnist1d, scores, train_batches
from quickstart import train

import ckptavg

LONG = {
    "uniform": "uniform",
    "linear": "linear",
    "EMA 0.9": "ema:decay=0.9",
    "power-function EMA 0.15": "power:sigma=0.15",
    "WSM linear": "wsm:decay=linear",
    "WSM 1-sqrt": "wsm:decay=1-sqrt",
    "WSM cosine": "wsm:decay=cosine",
    "median": "median",
    "trimmed mean, 20 %": "trimmed:fraction=0.2",
}
MIDDLE = {
    "last 10": "uniform:last=10",
    "last 6": "uniform:last=6",
    "EMA 0.8": "ema:decay=0.8",
    "power-function EMA 0.10": "power:sigma=0.1",
}
SHORT = {
    "last 3": "uniform:last=3",
    "EMA 0.5": "ema:decay=0.5",
    "power-function EMA 0.05": "power:sigma=0.05",
}
SCHEMES = LONG | MIDDLE | SHORT
Measured = dict[str, list[dict[str, float]]]  # row -> what was measured, one a seed


def main() -> None:
    """Train, sweep, show the table, check what it is said to show."""
    arguments = parse_arguments()
    dataset = load_mnist1d()
    measured: Measured = {}
    for seed in arguments.seeds:
        folder = arguments.work_dir / f"seed-{seed}"
        paths = train(dataset, folder / "run", n_epochs=arguments.epochs, seed=seed)
        averaged = paths[arguments.epochs * 140 // 300 :]
        for row, metrics in sweep(averaged, folder / "best").items():
            measured.setdefault(row, []).append(metrics)
    print_table(measured, n_seeds=len(arguments.seeds))
    check(measured)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Sweep over averages of MNIST-1D checkpoints.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=36, help="default: %(default)s")
    parser.add_argument("--work-dir", type=Path, default=Path("mnist1d-sweep-output"))
    return parser.parse_args()


def sweep(paths: list[Path], output: Path) -> dict[str, dict[str, float]]:
    """Make and judge all averages of some checkpoints.

    Returns:
        What was measured of each row of the table.
    """
    found = ckptavg.sweep(
        paths,
        output,
        schemes=list(SCHEMES.values()),
        evaluation=ckptavg.BnPass(model=build, batches=train_batches, evaluate=scores),
        metric="validation_accuracy",
        overwrite=True,
        device="cpu",
    )
    print(f"  {found.best} is best by {found.metric}; it is in {output}")
    by_scheme = {row.scheme: dict(row.metrics) for row in found.rows if row.kind == "average"}
    rows = {name: by_scheme[scheme] for name, scheme in SCHEMES.items()}
    rows["the best by validation"] = dict(found.rows[0].metrics)
    for kind, name in (("last", "last checkpoint"), ("single", "best single by validation")):
        for bn_pass in (False, True):
            candidates = [
                row.metrics for row in found.rows if row.kind == kind and row.bn_pass is bn_pass
            ]
            best = max(candidates, key=lambda metrics: metrics["validation_accuracy"])
            rows[f"{name} + BN pass" if bn_pass else name] = dict(best)
    return rows


def print_table(measured: Measured, *, n_seeds: int) -> None:
    """Print one row an average: test accuracy and negative log-likelihood."""
    print(f"\n{f'on the test set, {n_seeds} seeds':<42}{'accuracy %':>14}{'NLL':>17}")
    for row, runs in measured.items():
        accuracy, nll = ([run[name] for run in runs] for name in ("accuracy", "nll"))
        print(
            f"{row:<42}{fmean(accuracy):>8.2f} ± {pstdev(accuracy):.2f}"
            f"{fmean(nll):>9.3f} ± {pstdev(nll):.3f}"
        )


def check(measured: Measured) -> None:
    """Check what the table is said to show.

    Raises:
        SystemExit: If it does not.
    """
    accuracy = {row: fmean(run["accuracy"] for run in runs) for row, runs in measured.items()}
    uniform = accuracy["uniform"]
    facts = {
        "averages over a long window tie with the uniform mean": all(
            abs(accuracy[row] - uniform) <= 0.6 for row in LONG
        ),
        "those of the last few checkpoints lose": all(
            uniform - accuracy[row] >= 0.3 for row in SHORT
        ),
        "all beat the last checkpoint with a BN pass": all(
            accuracy[row] > accuracy["last checkpoint + BN pass"] for row in SCHEMES
        ),
        "long ones beat the best single checkpoint with a BN pass": all(
            accuracy[row] > accuracy["best single by validation + BN pass"] for row in LONG
        ),
    }
    print()
    for fact, holds in facts.items():
        print(f"{'yes' if holds else 'NO '} {fact}")
    if not all(facts.values()):
        raise SystemExit("not all of it holds here")


if __name__ == "__main__":
    main()
