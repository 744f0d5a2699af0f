"""What the numbers say about the paper's claims: those that hold at this size, and the others."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from averages import SWA_ARMS, averaged_epochs
from setups import CLEAN, Setup
from table import Table
from training import BUDGETS

import ckptavg

Measured = Sequence[dict[str, Any]]  # of one set-up, one a seed
LONGEST = BUDGETS[-1]
RATES = {
    "constant": "constant rate",
    "cyclical": "cyclical rate",
    "fixed": "fixed rate from scratch",
}


class Claim(NamedTuple):
    """A sentence, and whether it is so.

    Attributes:
        text: What is claimed, with the numbers that were found.
        holds: Whether they say so.
        is_expected: Whether it holds at this size whatever the seeds are; False for those of the
            paper's claims that do not, or do by chance.
    """

    text: str
    holds: bool
    is_expected: bool = True

    @property
    def verdict(self) -> str:
        """``NO`` where something is wrong, ``no`` where the paper's claim does not hold here."""
        if self.holds:
            return "yes"
        return "NO " if self.is_expected else "no "


class Landscapes(NamedTuple):
    """What the figures of weight space found, for one seed."""

    iterates: ckptavg.PlaneResult
    width: ckptavg.WidthResult
    path: ckptavg.PathResult
    barriers: ckptavg.PathResult | None  # which take a second seed, as does:
    two_seeds: Mapping[str, float] | None


def claims_of(
    setup: Setup, table: Table, measured: Measured, landscapes: Landscapes
) -> list[Claim]:
    """Return all claims about one set-up."""
    return [
        *_averages(table),
        *_against_sgd(setup, table),
        *_ensembles(setup, measured),
        *_running_averages(setup, measured),
        *_weight_space(landscapes),
    ]


def _averages(table: Table) -> list[Claim]:
    """Averages against the checkpoints that they are made of (Table 1)."""
    found = []
    for arm, least in (("constant", 0.3), ("cyclical", 0.0), ("fixed", 0.5)):
        rate = RATES[arm]
        gains = [
            table.mean(f"{rate}: SWA", budgets) - table.mean(f"{rate}: last + BN pass", budgets)
            for budgets in (BUDGETS if arm != "fixed" else (LONGEST,))
        ]
        found.append(
            Claim(
                f"{rate}: SWA beats its last checkpoint after a BN pass of its own "
                f"({_points(*gains)})",
                min(gains) > least,
            )
        )
    return found


def _against_sgd(setup: Setup, table: Table) -> list[Claim]:
    """Averages against the conventional run of the same length (Table 1)."""
    gains = {
        (arm, budgets): table.mean(f"{RATES[arm]}: SWA", budgets) - table.mean("SGD", budgets)
        for arm in SWA_ARMS
        for budgets in (BUDGETS if arm != "fixed" else (LONGEST,))
    }
    at_the_end = [gains[arm, LONGEST] for arm in SWA_ARMS]
    all_gains = list(gains.values())
    growth = [
        table.mean(f"{RATES[arm]}: SWA", LONGEST) - table.mean(f"{RATES[arm]}: SWA", BUDGETS[0])
        for arm in ("constant", "cyclical")
    ]
    faster = [
        table.mean("constant rate: SWA", budgets) - table.mean("cyclical rate: SWA", budgets)
        for budgets in BUDGETS
    ]
    found = [
        Claim(
            f"SWA beats SGD of the same budget ({_points(*all_gains)})",
            min(all_gains) > 0,
            is_expected=False,
        ),
        Claim(
            f"a larger budget makes SWA better ({_points(*growth)})",
            min(growth) > 0,
            is_expected=False,
        ),
        Claim(
            "averages at the constant rate are at least as good as at the cyclical one "
            f"({_points(*faster)})",
            min(faster) >= 0,
            is_expected=False,
        ),
    ]
    if setup.name == CLEAN.name:
        return [
            Claim(
                f"SWA ties with SGD of the same budget, within 1.5 points ({_points(*all_gains)})",
                max(map(abs, all_gains)) <= 1.5,
            ),
            *found,
        ]
    return [
        Claim(
            "where labels are wrong, SWA beats SGD of 1.5 budgets by a point "
            f"({_points(*at_the_end)})",
            min(at_the_end) > 1,
        ),
        *found,
    ]


def _ensembles(setup: Setup, measured: Measured) -> list[Claim]:
    """Averages against ensembles (section 3.5)."""
    end = str(setup.epochs(LONGEST))
    at_the_end = {
        arm: {
            key: fmean(one["ensemble"][arm][end][key] for one in measured)
            for key in ("agreement", "distance", "distance of neighbours")
        }
        for arm in SWA_ARMS
    }
    agreements = [one["agreement"] for one in at_the_end.values()]
    nearer = [one["distance of neighbours"] / one["distance"] for one in at_the_end.values()]
    return [
        Claim(
            "average and ensemble give 97 % of the labels alike "
            f"({', '.join(f'{one:.1f}' for one in agreements)} %)",
            min(agreements) >= 97,
        ),
        Claim(
            "their probabilities are nearer to each other than those of neighbouring checkpoints "
            f"({', '.join(f'{one:.1f}' for one in nearer)} times)",
            min(nearer) > 1.2,
        ),
    ]


def _running_averages(setup: Setup, measured: Measured) -> list[Claim]:
    """Averages against iterates over epochs (Figs. 6 and 7)."""
    found = []
    for figure, arm in (("6", "constant"), ("6", "cyclical"), ("7", "fixed")):
        epochs = averaged_epochs(setup, arm)[1:]
        gains = [
            fmean(
                one["test_error"][arm][str(epoch)]
                - (100 - one["swa"][arm][str(epoch)]["swa"]["accuracy"])
                for one in measured
            )
            for epoch in epochs
        ]
        found.append(
            Claim(
                f"Fig. {figure}, {RATES[arm]}: from the second on every average beats its newest "
                f"checkpoint (by {min(gains):.1f} to {max(gains):.1f} points)",
                min(gains) > 0,
            )
        )
    return found


def _weight_space(found: Landscapes) -> list[Claim]:
    """Figs. 3 to 5, and what becomes of unrelated runs."""
    mean = next(mark for mark in found.iterates.marks if mark.name == "mean")
    iterates = [
        mark.surface["test_loss"]
        for mark in found.iterates.marks
        if mark.name != "mean" and mark.surface is not None
    ]
    assert mean.metrics is not None  # the plane is measured where the mean is seen
    n_worse = sum(one > mean.metrics["test_loss"] for one in iterates)
    claims = [
        Claim(
            f"Fig. 3: on the plane the test loss is lower at the mean than at most iterates "
            f"({n_worse} of {len(iterates)})",
            n_worse > len(iterates) / 2,
        )
    ]
    for kind, by_solution in found.width.means.items():
        error = {name: one["test_error"] for name, one in by_solution.items()}
        rise = {name: one[-1] - one[0] for name, one in error.items()}
        claims += [
            Claim(
                f"Fig. 4, {kind}: SWA errs less than its last iterate all along the rays "
                f"({error['SWA'][-1]:.1f} and {error['last iterate'][-1]:.1f} % at their ends)",
                all(
                    one < other
                    for one, other in zip(error["SWA"], error["last iterate"], strict=True)
                ),
            ),
            Claim(
                f"Fig. 4, {kind}: SWA is about as wide as decayed SGD (its error rises by "
                f"{rise['SWA']:.1f} and {rise['SGD']:.1f} points)",
                0.75 <= rise["SWA"] / rise["SGD"] <= 1.25,
            ),
            Claim(
                f"Fig. 4, {kind}: SWA is much wider than SGD (its error rises half as much)",
                rise["SWA"] <= 0.5 * rise["SGD"],
                is_expected=False,
            ),
        ]
    (line,) = found.path.segments
    at_swa, at_sgd = (found.path.t.index(t) for t in (0.0, 1.0))
    loss = line.metrics["train_loss"]
    claims += [
        Claim(
            "Fig. 5: no barrier lies between SWA and the SGD run it branched off "
            f"({line.barriers['test_error']:.1f} points of test error)",
            line.barriers["test_error"] < 1,
        ),
        Claim(
            f"Fig. 5: SGD has the lower train loss ({loss[at_sgd]:.3f}, SWA {loss[at_swa]:.3f})",
            loss[at_sgd] < loss[at_swa],
            is_expected=False,
        ),
    ]
    if found.barriers is not None:
        other_schedule, other_seed = (one.barriers["test_error"] for one in found.barriers.segments)
        claims.append(
            Claim(
                "beside Fig. 5: a barrier lies between SWA and a run with another schedule from "
                f"the start, or another seed ({other_schedule:.0f} and {other_seed:.0f} points)",
                min(other_schedule, other_seed) > 5,
            )
        )
    if found.two_seeds is not None:
        claims += [
            Claim(
                "'ckptavg trajectory' tells beforehand, from the weights alone, that two seeds do "
                f"not belong together (cosine {found.two_seeds['cosine']:.2f})",
                bool(found.two_seeds["told_apart"]),
            ),
            Claim(
                "the average of two seeds is no better than chance, nearly "
                f"({found.two_seeds['accuracy']:.1f} %)",
                found.two_seeds["accuracy"] < 35,
            ),
        ]
    return claims


def _points(*differences: float) -> str:
    return f"{', '.join(f'{one:+.2f}' for one in differences)} points"
