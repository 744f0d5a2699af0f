"""The SWA paper, reproduced small: one command trains, averages, and draws Table 1 and the figures.

Run it in an environment with ckptavg, mnist1d and matplotlib::

    python reproduce.py                       # five minutes on two CPU cores
    python reproduce.py --setups clean --seeds 0 1 2
    python reproduce.py --device cuda

The paper is "Averaging Weights Leads to Wider Optima and Better Generalization" (Izmailov et al.
2018, arXiv 1803.05407). Its networks take days; this one has 3,826 parameters and learns MNIST-1D.

1. **Train** six runs a seed, which leave ordinary checkpoints: conventional SGD for 1, 1.25 and 1.5
   budgets; a constant and a cyclical learning rate that branch off SGD at 0.75 budgets; one fixed
   learning rate from scratch. All that with clean labels, and with a fifth of them redrawn.
2. **Average** with ckptavg: growing averages and ensembles of every run, each average with a
   BatchNorm (BN) pass of its own.
3. **Show**: Table 1 and Figs. 1, 3, 4, 5, 6 and 7, with every number as JSON and CSV beside the
   picture; ``index.md`` holds them all.
4. **Check** which of the paper's claims hold. Some do not at this size; README.md says which.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import landscapes
import torch
from claims import Claim, Landscapes, claims_of
from figures import figure_6, figure_7
from landscapes import COARSE, Effort, Run
from page import Found, write_page
from seeds import run_all, run_folder
from setups import CLEAN, NOISY, Setup
from table import Table

from ckptavg.plots.style import require_matplotlib


def main() -> None:
    """Train, average, show, check."""
    arguments = parse_arguments()
    require_matplotlib()
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:4.0f} s] {text}", flush=True)

    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    setups = [
        replace(setup, budget_epochs=8, n_train=500, n_test=500)
        if arguments.tiny
        else replace(setup, width=arguments.width)
        for setup in (CLEAN, NOISY)
        if setup.name in arguments.setups
    ]
    options = {"n_jobs": arguments.jobs, "say": say}
    measured = run_all(setups, arguments.seeds, output, arguments.device, **options)
    explored = explore(
        setups, arguments.seeds, output, arguments.device, COARSE if arguments.tiny else Effort(),
        **options,
    )  # fmt: skip
    found = []
    for setup in setups:
        table = Table(setup, measured[setup.name])
        table.write(output)
        figure_6(output, setup, measured[setup.name])
        figure_7(output, setup, measured[setup.name])
        claims = claims_of(setup, table, measured[setup.name], explored[setup.name])
        print(f"\n{table.text()}\n")
        if not arguments.tiny:  # which claims nothing
            print_claims(claims)
        found.append(Found(setup, table, claims))
    print()
    facts = {
        "torch": torch.__version__,
        "device": arguments.device,
        "jobs at a time": arguments.jobs,
        "seeds": arguments.seeds,
        "seconds": round(time.perf_counter() - started),
    }
    write_page(output, found, facts)
    say(f"all of it is in {output / 'index.md'}")
    if arguments.tiny:
        return
    failed = sum(claim.is_expected and not claim.holds for one in found for claim in one.claims)
    if failed:
        raise SystemExit(f"{failed} claims that should hold do not")


def print_claims(claims: Sequence[Claim]) -> None:
    """Print what holds and what does not: ``NO`` is a failure, ``no`` a claim of the paper's."""
    for claim in claims:
        print(f"{claim.verdict} {claim.text}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="The SWA paper, reproduced small.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--setups", nargs="+", choices=["clean", "noisy"], default=["clean", "noisy"],
        help="labels as they are, or a fifth of them redrawn; default: both",
    )  # fmt: skip
    parser.add_argument("--width", type=int, default=CLEAN.width, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=min(8, len(os.sched_getaffinity(0))),
        help="runs at a time (default: one a CPU core, up to 8: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("paper-output"))
    parser.add_argument(
        "--tiny", action="store_true", help="does it run at all? A minute, and no meaning"
    )
    return parser.parse_args()


def explore(
    setups: Sequence[Setup],
    seeds: Sequence[int],
    output: Path,
    device: str,
    effort: Effort,
    *,
    n_jobs: int,
    say: Callable[[str], None],
) -> dict[str, Landscapes]:
    """Make the figures of weight space for the first seed of each set-up, several at a time."""
    jobs: dict[str, Future[Any]] = {}
    with ProcessPoolExecutor(n_jobs, mp_context=get_context("spawn")) as workers:
        for setup in setups:
            run, *others = (
                Run(setup, seed, run_folder(output, setup, seed), device) for seed in seeds[:2]
            )
            calls: dict[str, tuple[Callable[..., object], tuple[object, ...]]] = {
                "fig4": (landscapes.figure_4, (effort,)),
                "fig3": (landscapes.figure_3, (effort,)),
                "fig1-right": (landscapes.figure_1_right, (effort,)),
                "fig1-left": (landscapes.figure_1_left, (effort,)),
                "fig5": (landscapes.figure_5, (effort,)),
            }
            if others:
                calls["fig5-barriers"] = landscapes.figure_5_barriers, (effort, others[0])
                calls["two-seeds"] = landscapes.average_of_two_seeds, (others[0],)
            for name, (call, rest) in calls.items():
                called = f"{name}-{setup.name}"
                jobs[called] = workers.submit(call, run, output / called, *rest)
        names = {job: name for name, job in jobs.items()}
        try:
            for job in as_completed(names):
                job.result()
                say(f"{names[job]}: done")
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    return {
        setup.name: Landscapes(
            iterates=jobs[f"fig3-{setup.name}"].result(),
            width=jobs[f"fig4-{setup.name}"].result(),
            path=jobs[f"fig5-{setup.name}"].result(),
            barriers=_result(jobs.get(f"fig5-barriers-{setup.name}")),
            two_seeds=_result(jobs.get(f"two-seeds-{setup.name}")),
        )
        for setup in setups
    }


def _result(job: Future[Any] | None) -> Any:
    return None if job is None else job.result()


if __name__ == "__main__":
    main()
