"""Figs. 1, 3, 4 and 5: what the loss is like around iterates, SGD and SWA.

Everything is measured and drawn by ``ckptavg.plane``, ``width`` and ``path``, with BatchNorm (BN)
statistics recomputed at every point; each call makes a folder with numbers and pictures.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from averages import judge
from setups import Setup, build, labelled_batches, train_batches
from training import BRANCH, BUDGETS, WEIGHT_DECAY, checkpoint_path

import ckptavg


class Run(NamedTuple):
    """One seed of a set-up, trained.

    Attributes:
        setup: What was trained.
        seed: Which seed.
        folder: Where its checkpoints are.
        device: Where models run.
    """

    setup: Setup
    seed: int
    folder: Path
    device: str

    def last(self, arm: str) -> Path:
        """Return the last checkpoint of an arm."""
        budgets = float(arm.removeprefix("sgd-")) if arm.startswith("sgd-") else BUDGETS[-1]
        return checkpoint_path(self.folder, arm, self.setup.epochs(budgets))

    @property
    def branch(self) -> Path:
        """The checkpoint from which the constant and the cyclical rate start."""
        return checkpoint_path(self.folder, "sgd-1", self.setup.epochs(BRANCH))

    @property
    def swa(self) -> Path:
        """The average at the constant rate, over all its checkpoints."""
        return self.folder / "swa"


class Effort(NamedTuple):
    """How fine the figures are.

    Attributes:
        plane_points: Grid points along each side of a plane.
        rays: Random directions of each kind.
        ray_points: Points along each.
        path_points: Points along a line.
        relative: How far filter-normalised rays go, in lengths of the filters.
    """

    plane_points: int = 15
    rays: int = 8
    ray_points: int = 7
    path_points: int = 26
    relative: float = 0.3


COARSE = Effort(plane_points=3, rays=1, ray_points=3, path_points=3)


def figure_1_left(run: Run, output: Path, effort: Effort) -> ckptavg.PlaneResult:
    """Fig. 1, left: three samples of the cyclical rate and their mean."""
    return ckptavg.plane(
        run.folder / "cyclical",
        output,
        evaluation=evaluation(run, "test"),
        selection=ckptavg.Selection(at_lr_minima=True, first=3),
        points=effort.plane_points,
        device=run.device,
        overwrite=True,
    )


def figure_1_right(run: Run, output: Path, effort: Effort) -> ckptavg.PlaneResult:
    """Fig. 1, middle and right: from one start, where SGD ends and where SWA does."""
    return ckptavg.plane(
        run.folder / "constant",
        output,
        evaluation=evaluation(run, "train", "test"),
        through=(run.branch, run.last("sgd-1"), "mean"),
        points=effort.plane_points,
        device=run.device,
        overwrite=True,
    )


def figure_3(run: Run, output: Path, effort: Effort) -> ckptavg.PlaneResult:
    """Fig. 3: first, middle and last iterate at the constant rate; the others are projected."""
    return ckptavg.plane(
        run.folder / "constant",
        output,
        evaluation=evaluation(run, "train", "test"),
        points=effort.plane_points,
        device=run.device,
        overwrite=True,
    )


def figure_4(run: Run, output: Path, effort: Effort) -> ckptavg.WidthResult:
    """Fig. 4: random rays from SWA, from SGD, and from the last iterate that went into SWA."""
    return ckptavg.width(
        {"SWA": run.swa, "SGD": run.last("sgd-1"), "last iterate": run.last("constant")},
        output,
        evaluation=evaluation(run, "train", "test"),
        rays=effort.rays,
        points=effort.ray_points,
        relative=effort.relative,
        device=run.device,
        overwrite=True,
    )


def figure_5(run: Run, output: Path, effort: Effort) -> ckptavg.PathResult:
    """Fig. 5: the line from SWA to the SGD run that it branched off."""
    return ckptavg.path(
        run.swa,
        run.last("sgd-1"),
        output,
        evaluation=evaluation(run, "train", "test"),
        points=effort.path_points,
        device=run.device,
        overwrite=True,
    )


def figure_5_barriers(run: Run, output: Path, effort: Effort, other: Run) -> ckptavg.PathResult:
    """Beside Fig. 5: lines to runs that share less, or nothing, with SWA's.

    The fixed rate shares initial weights and batches with it, the run of another seed nothing.
    """
    return ckptavg.path(
        run.swa,
        [run.last("fixed"), other.last("sgd-1")],
        output,
        evaluation=evaluation(run, "train", "test"),
        t=(-0.25, 1.25),
        points=effort.path_points,
        device=run.device,
        overwrite=True,
    )


def average_of_two_seeds(run: Run, output: Path, other: Run) -> Mapping[str, float]:
    """Average the SGD solutions of two seeds, which nothing makes compatible; judge the result.

    What ``trajectory`` says of them beforehand, without model and data, is told beside.
    """
    both = [run.last("sgd-1"), other.last("sgd-1")]
    seen = ckptavg.trajectory(both, device=run.device)
    found = ckptavg.average_checkpoints(
        both,
        output,
        batchnorm=judge(run.setup, run.seed, run.device),
        device=run.device,
        overwrite=True,
    )
    told = {"cosine": seen.cosines[0][1], "told_apart": float(seen.kind == "unrelated")}
    return {**(found.outputs[0].metrics or {}), **told}


def evaluation(run: Run, *parts: str) -> ckptavg.BnPass:
    """Return what is measured at every point: loss and error on parts of the data.

    Losses are regularised as in training, like those of the paper's figures.
    """
    return ckptavg.BnPass(
        model=partial(build, run.setup),
        batches=partial(train_batches, run.setup, run.seed, run.device),
        evaluate=ckptavg.LabelledEvaluation(
            loaders=[
                ckptavg.Loader(
                    name=part,
                    batches=partial(labelled_batches, run.setup, run.seed, run.device, part),
                )
                for part in parts
            ],
            weight_decay=WEIGHT_DECAY,
        ),
    )
