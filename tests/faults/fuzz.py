"""Fuzzing of the readers: ``PYTHONPATH=tests python -m faults.fuzz --count 100000 --seed 1``.

A failure is made again by its kind, seed and number:
``python -m faults.fuzz --kind KIND --seed SEED --first NUMBER --count 1``.
"""

import argparse
import gc
import json
import resource
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch

from faults.judging import Tally, judge
from faults.mutations import KINDS, mutant

_MAX_GROWTH_BYTES = 10**9
_MUTANTS_PER_TASK = 500


def fuzz(
    count: int,
    seed: int,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    processes: int = 1,
    first: int = 0,
) -> list[Tally]:
    """Judge mutants in processes of their own; return a tally for each kind.

    Args:
        count: How many, over all kinds.
        seed: Together with kind and number says what a mutant is.
        kinds: Of the mutants.
        processes: How many.
        first: Number of the first mutant of each kind.
    """
    tallies = {kind: Tally(kind) for kind in kinds}
    ranges = []
    for at, kind in enumerate(kinds):
        stop = first + count // len(kinds) + (at < count % len(kinds))
        ranges += [
            (kind, range(start, min(stop, start + _MUTANTS_PER_TASK)))
            for start in range(first, stop, _MUTANTS_PER_TASK)
        ]
    with ProcessPoolExecutor(processes, get_context("spawn"), _prepare_process) as pool:
        running = [
            (kind, numbers, pool.submit(judge, kind, seed, numbers)) for kind, numbers in ranges
        ]
        for kind, numbers, future in running:
            tallies[kind].add(_result(kind, numbers, future))
    return list(tallies.values())


def _result(kind: str, numbers: range, future: Future[Tally]) -> Tally:
    try:
        return future.result()
    except BrokenProcessPool:
        what = f"a process ended while mutants {numbers[0]} to {numbers[-1]} were to be judged"
        tally = Tally(kind)
        tally.fail(numbers[0], what)
        return tally


def _prepare_process() -> None:
    """Limit what a process may take, and silence what torch and numpy warn of."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for kind in KINDS:
        mutant(kind, 0, 0)  # makes what mutants of the kind begin with
    status = Path("/proc/self/status").read_text()
    (used,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmData")]
    limit = int(used) * 1024 + _MAX_GROWTH_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    gc.collect()
    gc.freeze()


def table(tallies: Sequence[Tally]) -> str:
    """Return what became of all mutants, a line for each kind."""
    columns = (
        "kind", "mutants", "accepted", "refused", "stricter", "tolerated", "slowest ms", "failures",
    )  # fmt: skip
    total = Tally("all")
    for tally in tallies:
        total.add(tally)
    rows = [columns, *(_row(tally) for tally in (*tallies, total))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if at else text.ljust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _row(tally: Tally) -> tuple[str, ...]:
    return (
        tally.kind,
        f"{tally.mutants:,}",
        f"{tally.accepted:,}",
        f"{tally.refused:,}",
        f"{tally.stricter.total():,}",
        f"{tally.tolerated.total():,}",
        f"{tally.slowest_seconds * 1000:.1f}",
        f"{tally.causes.total():,}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if anything was judged wrongly, else 0."""
    parser = argparse.ArgumentParser(prog="faults.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="mutants, over all kinds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", action="append", choices=tuple(KINDS), help="all, if not given")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--first", type=int, default=0, help="number of each kind's first mutant")
    parser.add_argument("--json", action="store_true", help="print all that is known, as JSON")
    options = parser.parse_args(arguments)
    tallies = fuzz(
        options.count,
        options.seed,
        kinds=options.kind or tuple(KINDS),
        processes=options.processes,
        first=options.first,
    )
    if options.json:
        _print(json.dumps([vars(tally) for tally in tallies]))
    else:
        _print(table(tallies))
        for tally in tallies:
            for number, what in tally.failures:
                _print(f"failure: {(tally.kind, options.seed, number)}: {what[:500]}")
    return int(any(tally.causes for tally in tallies))


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
