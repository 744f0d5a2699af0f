"""What becomes of the checkpoints of one seed: every average is made and judged by ckptavg."""

from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from setups import Setup, build, labelled_batches, scores, train_batches
from training import (
    BUDGETS,
    CYCLE_EPOCHS,
    checkpoint_path,
    first_averaged,
    logged,
)

import ckptavg

SGD_ARMS = tuple(f"sgd-{budgets:g}" for budgets in BUDGETS)
SWA_ARMS = ("constant", "cyclical", "fixed")


def measure(setup: Setup, seed: int, folder: Path, device: str) -> dict[str, Any]:
    """Average, judge and ensemble the checkpoints of one seed's arms.

    Returns:
        ``test_error`` of each arm by epoch, as its log says; what was measured of ``sgd`` by arm,
        of ``swa`` and of ``ensemble`` by arm and epoch.
    """
    return {
        "setup": setup.name,
        "seed": seed,
        "test_error": {arm: logged(folder, arm, "test_error") for arm in (*SGD_ARMS, *SWA_ARMS)},
        "sgd": {
            f"sgd-{budgets:g}": conventional_run(setup, seed, folder, device, budgets)
            for budgets in BUDGETS
        },
        "swa": {arm: growing_averages(setup, seed, folder, device, arm) for arm in SWA_ARMS},
        "ensemble": {arm: growing_ensembles(setup, seed, folder, device, arm) for arm in SWA_ARMS},
    }


def write_swa(setup: Setup, seed: int, folder: Path, device: str) -> None:
    """Average all checkpoints at the constant rate, and recompute BN statistics: into ``swa``."""
    ckptavg.average_checkpoints(
        folder / "constant",
        folder / "swa",
        batchnorm=judge(setup, seed, device),
        overwrite=True,
        device=device,
    )


def averaged_epochs(setup: Setup, arm: str) -> list[int]:
    """Return the epochs whose checkpoints an arm averages: all, or the last of each cycle."""
    every = CYCLE_EPOCHS if arm == "cyclical" else 1
    return list(range(first_averaged(setup, arm), setup.epochs(BUDGETS[-1]) + 1, every))


def conventional_run(
    setup: Setup, seed: int, folder: Path, device: str, budgets: float
) -> dict[str, dict[str, float]]:
    """Judge the last checkpoint of a conventional run, as it is and after a BatchNorm (BN) pass."""
    last = checkpoint_path(folder, f"sgd-{budgets:g}", setup.epochs(budgets))
    found = ckptavg.sweep(
        [last],
        folder / "average",
        schemes="uniform",
        evaluation=judge(setup, seed, device),
        metric="validation_accuracy",
        singles=False,
        overwrite=True,
        device=device,
    )
    return {
        "BN pass" if row.bn_pass else "as saved": dict(row.metrics)
        for row in found.rows
        if row.kind == "last"
    }


def growing_averages(
    setup: Setup, seed: int, folder: Path, device: str, arm: str
) -> dict[int, dict[str, dict[str, float]]]:
    """Judge the uniform mean of the first checkpoint, of the first two, and so on.

    Returns:
        By the epoch of the newest one in it: ``swa``, the mean with a BN pass; and of this newest
        one alone ``single``, as it is, and ``single, BN pass``.
    """
    epochs = averaged_epochs(setup, arm)
    found = ckptavg.sweep(
        folder / arm,
        folder / "average",
        schemes=f"uniform:first=1..{len(epochs)}",
        at_lr_minima=arm == "cyclical",
        evaluation=judge(setup, seed, device),
        metric="validation_accuracy",
        overwrite=True,
        device=device,
    )
    averages = {row.n_checkpoints: row for row in found.rows if row.kind == "average"}
    singles = {(row.name, row.bn_pass): row for row in found.rows if row.kind == "single"}
    return {
        epoch: {
            "swa": dict(averages[number].metrics),
            "single": dict(singles[str(checkpoint_path(folder, arm, epoch)), False].metrics),
            "single, BN pass": dict(
                singles[str(checkpoint_path(folder, arm, epoch)), True].metrics
            ),
        }
        for number, epoch in enumerate(epochs, start=1)
    }


def judge(setup: Setup, seed: int, device: str) -> ckptavg.BnPass:
    """Return who judges: the model, the signals for BN passes, the metrics."""
    return ckptavg.BnPass(
        model=partial(build, setup),
        batches=partial(train_batches, setup, seed, device),
        evaluate=partial(scores, setup, seed, device),
    )


def growing_ensembles(
    setup: Setup, seed: int, folder: Path, device: str, arm: str
) -> dict[int, dict[str, float]]:
    """Judge the mean prediction of the first checkpoints, and compare it with their average.

    Returns:
        By the epoch of the newest of them: accuracy and negative log-likelihood of the ensemble,
        the share of labels on which ensemble and average agree in percent, and how far their
        probabilities are apart; likewise those of neighbouring checkpoints.
    """
    test = ckptavg.Loader(
        name="test", batches=partial(labelled_batches, setup, seed, device, "test")
    )
    found = ckptavg.ensemble(
        folder / arm,
        folder / f"ensemble-{arm}",
        evaluation=ckptavg.BnPass(
            model=partial(build, setup),
            batches=partial(train_batches, setup, seed, device),
            evaluate=ckptavg.LabelledEvaluation(loaders=[test]),
        ),
        selection=ckptavg.Selection(at_lr_minima=arm == "cyclical"),
        overwrite=True,
        device=device,
    )
    (on_test,) = found.loaders
    apart = fmean(on_test.neighbour_distances)
    return {
        epoch: {
            "accuracy": of_ensemble.accuracy,
            "nll": of_ensemble.nll,
            "agreement": on_test.agreements[at],
            "distance": on_test.distances[at],
            "distance of neighbours": apart,
        }
        for at, (epoch, of_ensemble) in enumerate(
            zip(averaged_epochs(setup, arm), on_test.ensembles, strict=True)
        )
    }
