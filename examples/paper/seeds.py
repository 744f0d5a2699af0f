"""Every seed of every set-up, several at a time: trained, averaged, judged."""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from averages import measure, write_swa
from files import write_json
from setups import Setup
from training import train_all

Measured = list[dict[str, Any]]  # of one set-up, one a seed


def run_all(
    setups: Sequence[Setup],
    seeds: Sequence[int],
    output: Path,
    device: str,
    *,
    n_jobs: int,
    say: Callable[[str], None],
    seconds: float | None = None,
) -> dict[str, Measured]:
    """Run all seeds of all set-ups.

    Args:
        setups: What is trained.
        seeds: Of each.
        output: Gets a folder ``runs``.
        device: Where.
        n_jobs: So many at a time.
        say: Told what is done.
        seconds: No further seed is begun after so many; None runs all.

    Returns:
        What was measured, by set-up; in the order of the seeds.
    """
    started = time.perf_counter()
    found: dict[tuple[str, int], dict[str, Any]] = {}
    with ProcessPoolExecutor(n_jobs, mp_context=get_context("spawn")) as workers:
        jobs = {
            workers.submit(run_seed, setup, seed, run_folder(output, setup, seed), device): (
                setup.name,
                seed,
            )
            for seed in seeds  # so that all set-ups have come as far, whenever it ends
            for setup in setups
        }
        try:
            for job in as_completed(jobs):
                if job.cancelled():
                    continue
                found[jobs[job]] = job.result()
                name, seed = jobs[job]
                say(f"{name}, seed {seed}: done after {time.perf_counter() - started:.0f} s")
                if seconds is not None and time.perf_counter() - started > seconds:
                    for waiting in jobs:
                        waiting.cancel()
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    return {
        setup.name: [found[setup.name, seed] for seed in seeds if (setup.name, seed) in found]
        for setup in setups
    }


def run_folder(output: Path, setup: Setup, seed: int) -> Path:
    """Return where the checkpoints of a seed are."""
    return output / "runs" / setup.name / f"seed-{seed}"


def run_seed(setup: Setup, seed: int, folder: Path, device: str) -> dict[str, Any]:
    """Train and measure one seed; return what was measured, as JSON has it."""
    train_all(setup, seed, folder, device)
    write_swa(setup, seed, folder, device)
    write_json(folder / "measured.json", measure(setup, seed, folder, device))
    found: dict[str, Any] = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    return found
