"""The SWA paper, reproduced small: one command trains, averages, and draws Table 1 and the figures.

Run it in an environment with ckptavg, mnist1d and matplotlib::

    python reproduce.py                      # on a CPU, ... minutes
    python reproduce.py --device cuda

It trains..."""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

from figures import figure_6, figure_7
from seeds import run_all
from setups import CLEAN, NOISY
from table import Table

from ckptavg.plots.style import require_matplotlib


def main() -> None:
    """Train, average, draw, check."""
    arguments = parse_arguments()
    require_matplotlib()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    setups = [
        replace(
            setup, budget_epochs=arguments.budget, width=arguments.width, n_train=arguments.train
        )
        for setup in (CLEAN, NOISY)
        if setup.name in arguments.setups
    ]
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:4.0f} s] {text}", flush=True)

    measured = run_all(
        setups, arguments.seeds, output, arguments.device, n_jobs=arguments.jobs, say=say
    )
    for setup in setups:
        table = Table(setup, measured[setup.name])
        table.write(output)
        print(f"\n{table.text()}")
        figure_6(output, setup, measured[setup.name])
        figure_7(output, setup, measured[setup.name])


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="The SWA paper, reproduced small.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--setups", nargs="+", choices=["clean", "noisy"], default=["clean", "noisy"]
    )
    parser.add_argument("--budget", type=int, default=CLEAN.budget_epochs)
    parser.add_argument("--width", type=int, default=CLEAN.width)
    parser.add_argument("--train", type=int, default=CLEAN.n_train)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=Path("paper-output"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
