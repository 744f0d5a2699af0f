"""The command line; see ``python -m tests.benchmarks --help``."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import click

from .contenders import PEERS, can_read, ckptavg, ckptavg_command, is_installed, peer
from .hub import hub_contenders, served
from .inputs import LAYOUTS, SETS, InputError, InputSet, make_inputs
from .measure import BenchmarkError, Contender, Run, measure, memory_warning, ratio, typical

Command = TypeVar("Command", bound=Callable[..., Any])
Runs = dict[str, list[Run]]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all commands measure with, and what they have measured."""

    folder: Path
    keep: bool  # the inputs, in the folder
    gb: float
    repeats: int
    device: str
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def outputs(self) -> Path:
        """Return where contenders write."""
        return self.folder / "outputs"

    def make(self, name: str, n_checkpoints: int, gb: float | None = None) -> InputSet:
        """Make a set of inputs."""
        nbytes = round((self.gb if gb is None else gb) * 1e9)
        return make_inputs(self.folder, name, n_checkpoints=n_checkpoints, nbytes=nbytes, say=_say)

    def measure(self, inputs: InputSet, contenders: Sequence[Contender], **what: Any) -> Runs:
        """Run contenders and remember the results, with ``what`` they are about."""
        due = max(contender.due_nbytes for contender in contenders)
        if warning := memory_warning(inputs.nbytes + 2 * due):
            _say(warning)
        runs = measure(contenders, self.repeats, _say)
        size = inputs.checkpoint_nbytes
        about = {"set": inputs.name, "checkpoints": len(inputs.paths), "checkpoint_nbytes": size}
        listed = {name: [asdict(run) for run in own] for name, own in runs.items()}
        self.results.append({**about, "input_nbytes": inputs.nbytes, **what, "runs": listed})
        return runs

    def discard(self, inputs: InputSet) -> None:
        """Remove inputs that nobody asked to keep."""
        if not self.keep:
            shutil.rmtree(inputs.paths[0].parent)


@contextmanager
def prepared(
    work: Path | None, gb: float, repeats: int, device: str, json_path: Path | None
) -> Iterator[Bench]:
    """Give a bench; at the end write what it measured, and turn failures into messages."""
    try:
        with tempfile.TemporaryDirectory(prefix="ckptavg-benchmarks-") as temporary:
            folder = (work or Path(temporary)).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            bench = Bench(
                folder=folder, keep=work is not None, gb=gb, repeats=repeats, device=device
            )
            try:
                yield bench
            finally:
                shutil.rmtree(bench.outputs, ignore_errors=True)
                if json_path and bench.results:
                    content = {"device": device, "machine": _machine(), "results": bench.results}
                    json_path.parent.mkdir(parents=True, exist_ok=True)
                    json_path.write_text(json.dumps(content, indent=1) + "\n")
    except (InputError, BenchmarkError) as error:
        raise click.ClickException(str(error)) from error


def common_options(command: Command) -> Command:
    """Add the options that all three commands have."""
    for option in (
        click.option(
            "--json", "json_path", type=click.Path(path_type=Path), metavar="FILE",
            help="Write all runs, and what the machine is, to FILE.",
        ),
        click.option(
            "--device", default="cpu", type=click.Choice(["cpu", "cuda"]),
            help="Where ckptavg, naive and mergekit do the arithmetic.",
        ),
        click.option(
            "--repeats", default=5, type=click.IntRange(min=1),
            help="Rounds that count, after one that does not.",
        ),
        click.option("--gb", default=1.0, help="Size of a Llama checkpoint, in 10^9 bytes."),
        click.option(
            "--work", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
            help="Keep inputs in DIR, and use those that are there; default: a temporary "
            "directory (TMPDIR says where), removed at the end.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def listed(
    of: Callable[[str], Any],
) -> Callable[[click.Context, click.Parameter, str], list[Any]]:
    """Return a callback that reads comma-separated values."""

    def read(context: click.Context, parameter: click.Parameter, text: str) -> list[Any]:
        try:
            return [of(part.strip()) for part in text.split(",") if part.strip()]
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return read


def checkpoints_option(minimum: int) -> Callable[[Command], Command]:
    """Return the option that says how many checkpoints to average."""
    return click.option(
        "--checkpoints", default=8, type=click.IntRange(min=minimum), help="How many to average."
    )


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Measure ckptavg on inputs made for it; run from the repository root.

    Example: python -m tests.benchmarks compare --sets llama-bf16 --gb 0.5 --checkpoints 4
    """


@main.command()
@common_options
@click.option("--sets", default=",".join(SETS), callback=listed(str), help="Inputs to average.")
@click.option(
    "--peers", default=",".join(PEERS), callback=listed(str),
    help="Whom to measure beside the floor and ckptavg, each on the sets it can read.",
)  # fmt: skip
@checkpoints_option(1)
def compare(sets: list[str], peers: list[str], checkpoints: int, **common: Any) -> None:
    """Compare ckptavg with a plain read and write and with peers; one table a set of inputs.

    The floor reads every input byte, writes and syncs one output, and does nothing else.
    "x floor" and "x ckptavg" are medians of the ratios of wall times, round by round. Only the
    floor and ckptavg sync their output to storage; the others leave that to the system.

    \b
    Example:
      python -m tests.benchmarks compare --sets llama-bf16,llama-pt --gb 0.5 --json compare.json
    """
    if unknown := [name for name in peers if name not in PEERS]:
        raise click.UsageError(f"no peer is named '{unknown[0]}'; there are {', '.join(PEERS)}")
    with prepared(**common) as bench:
        for name in sets:
            inputs = bench.make(name, checkpoints)
            able = [one for one in peers if can_read(one, inputs)]
            present = [one for one in able if is_installed(one)]
            contenders = [
                peer("floor", inputs, bench.outputs),
                ckptavg(inputs, bench.outputs, bench.device),
                *(peer(one, inputs, bench.outputs, bench.device) for one in present),
            ]
            runs = bench.measure(inputs, contenders)
            bench.discard(inputs)
            rows = [_comparison(name, runs) for name in runs]
            rows += [[one, "not installed"] for one in able if one not in present]
            click.echo(f"\n{_described(inputs)}, on {bench.device}")
            header = "contender,wall s,min s,x floor,x ckptavg,CPU s,RssAnon MB,device MB"
            _echo_table(f"{header},averaging GB/s", rows)


def _comparison(name: str, runs: Runs) -> list[str]:
    own = runs[name]
    rates = [
        report["read_nbytes"] / report["average_seconds"] / 1e9
        for report in (run.reports[0] for run in own)
        if "average_seconds" in report
    ]
    return [
        name,
        f"{typical(own):.3f}",
        f"{min(run.seconds for run in own):.3f}",
        f"{ratio(own, runs['floor']):.2f}",
        f"{ratio(own, runs['ckptavg']):.2f}",
        f"{typical(own, 'cpu_seconds'):.2f}",
        *_memory(own),
        f"{median(rates):.2f}" if rates else "",
    ]


@main.command()
@common_options
@click.option("--set", "set_name", default="llama-bf16", type=click.Choice(SETS[:3]))
@click.option(
    "--counts", default="2,4,8,16,32", callback=listed(int),
    help="Numbers of checkpoints, of --gb each; may be empty.",
)  # fmt: skip
@click.option(
    "--sizes", default="0.25,0.5,1,2,4", callback=listed(float),
    help="Sizes of a checkpoint in 10^9 bytes, --checkpoints of each; may be empty.",
)  # fmt: skip
@checkpoints_option(1)
def growth(
    set_name: str, counts: list[int], sizes: list[float], checkpoints: int, **common: Any
) -> None:
    """Show how time and memory grow with the number and with the size of checkpoints.

    Wall time holds the start of the process, which small inputs feel; "averaging" is what ckptavg
    itself measures, without. The spread is the largest over the smallest in a column.

    \b
    Example:
      python -m tests.benchmarks growth --gb 0.5 --counts 2,4,8 --sizes 0.25,1 --json growth.json
    """
    with prepared(**common) as bench:
        for title, points in {
            f"{bench.gb:g} GB each": [(count, bench.gb) for count in counts],
            f"{checkpoints} checkpoints": [(checkpoints, size) for size in sizes],
        }.items():
            measured = []
            for number, (count, gb) in enumerate(points, start=1):
                inputs = bench.make(set_name, count, gb)
                floor = peer("floor", inputs, bench.outputs)
                own = ckptavg(inputs, bench.outputs, bench.device)
                measured.append((inputs, bench.measure(inputs, [floor, own], series=title)))
                if gb not in [later for _, later in points[number:]]:
                    bench.discard(inputs)
            if measured:
                click.echo(f"\n{set_name}, {title}, on {bench.device}")
                _echo_growth(measured)


def _echo_growth(measured: Sequence[tuple[InputSet, Runs]]) -> None:
    rows, costs = [], []
    for inputs, runs in measured:
        own, floor = runs["ckptavg"], runs["floor"]
        averaging = median(run.reports[0]["average_seconds"] for run in own)
        seconds = (typical(own), averaging, typical(floor))
        cost = [one * 1e9 / inputs.nbytes for one in seconds]
        costs.append(cost)
        size = f"{inputs.checkpoint_nbytes / 1e9:.3f}"
        ours = [*(f"{one:.3f}" for one in seconds), f"{ratio(own, floor):.2f}"]
        per_byte = [f"{one:.4f}" for one in cost]
        rows.append([str(len(inputs.paths)), size, *ours, *per_byte, *_memory(own)])
    header = "checkpoints,GB each,ckptavg s,averaging s,floor s,x floor"
    _echo_table(f"{header},ckptavg ns/B,averaging ns/B,floor ns/B,RssAnon MB,device MB", rows)
    own_spread, averaging_spread, floor_spread = (
        f"{max(column) / min(column):.2f}" for column in zip(*costs, strict=True)
    )
    click.echo(
        f"spread (max/min) of the time per input byte: ckptavg {own_spread}, "
        f"averaging {averaging_spread}, floor {floor_spread}"
    )


@main.command()
@common_options
@checkpoints_option(1)
def hub(checkpoints: int, **common: Any) -> None:
    """Compare averaging from a Hub on loopback with a plain client that reads the same ranges.

    The client keeps nothing, checks nothing and adds nothing. "GB/s" is without the start of the
    process. The Hub runs on the same CPUs.

    \b
    Example:
      python -m tests.benchmarks hub --gb 0.5 --json hub.json
    """
    with prepared(**common) as bench:
        inputs = bench.make("llama-bf16", checkpoints)
        with served(inputs) as address:
            runs = bench.measure(inputs, hub_contenders(inputs, bench.outputs, address))
        rows = []
        for name, own in runs.items():
            reports = [run.reports[0] for run in own]
            rates = [one["read_nbytes"] / one["average_seconds"] / 1e9 for one in reports]
            ratios = [f"{ratio(own, other):.2f}" for other in runs.values()]
            memory = _memory(own)[0]
            rows.append([name, f"{typical(own):.3f}", f"{median(rates):.3f}", *ratios, memory])
        click.echo(f"\n{_described(inputs)}, from a Hub on loopback")
        header = ",".join(f"x {name.replace(', ', ' ')}" for name in runs)
        _echo_table(f"contender,wall s,GB/s,{header},RssAnon MB", rows)


@main.command()
@common_options
@click.option("--set", "set_name", default="llama-bf16", type=click.Choice(SETS))
@click.option(
    "--schemes", "n_schemes", default=4, type=click.IntRange(min=2),
    help="How many averages, of the last N checkpoints, N from 2 to all.",
)  # fmt: skip
@checkpoints_option(3)
def schemes(set_name: str, n_schemes: int, checkpoints: int, **common: Any) -> None:
    """Compare m averages from one read with m runs, and with one average and m - 1 more writes.

    "m in one / (one + writing)" near 1 means that a further average costs what writing it costs.
    "writing" writes and syncs m - 1 outputs and does nothing else; its start is not counted.

    \b
    Example:
      python -m tests.benchmarks schemes --gb 0.5 --checkpoints 8 --schemes 4 --json schemes.json
    """
    if n_schemes >= checkpoints:
        raise click.UsageError("--schemes must be less than --checkpoints")
    wanted = [f"uniform:last={count}" for count in spread_counts(checkpoints, n_schemes)]
    with prepared(**common) as bench:
        inputs = bench.make(set_name, checkpoints)
        contenders = scheme_contenders(inputs, bench.outputs, bench.device, wanted)
        runs = bench.measure(inputs, contenders, schemes=wanted)
        click.echo(f"\n{_described(inputs)}, on {bench.device}: {', '.join(wanted)}")
        _echo_schemes(runs)


@main.command()
@common_options
@checkpoints_option(2)
def layouts(checkpoints: int, **common: Any) -> None:
    """Compare averaging the same 16 float32 matrices out of several layouts.

    Whole in a safetensors or torch file; in rows (FSDP) or columns (tensor parallel) over four
    processes in torch.distributed.checkpoint directories. "x" above 1 is faster than safetensors.

    \b
    Example:
      python -m tests.benchmarks layouts --gb 3.2 --checkpoints 2 --json layouts.json
    """
    with prepared(**common) as bench:
        sets = [bench.make(name, checkpoints) for name in LAYOUTS]
        contenders = [
            replace(
                ckptavg(inputs, bench.outputs / inputs.name, bench.device),
                name=inputs.name.removeprefix("matrices-"),
            )
            for inputs in sets
        ]
        runs = bench.measure(sets[0], contenders)
        click.echo(f"\n{_described(sets[0])}, on {bench.device}")
        first = next(iter(runs.values()))
        rows = [
            [name, f"{typical(own):.3f}", f"{ratio(first, own):.2f}", *_memory(own)]
            for name, own in runs.items()
        ]
        _echo_table("layout,wall s,x safetensors,RssAnon MB,device MB", rows)


@main.command()
@common_options
@click.option("--set", "set_name", default="llama-f32", type=click.Choice(SETS))
@checkpoints_option(2)
def trajectory(set_name: str, checkpoints: int, **common: Any) -> None:
    """Compare comparing checkpoints with averaging them: one pass over the same bytes.

    "pass s" is what ckptavg itself measures of the pass, without the start of the process; the
    ratio is the median of the rounds' ratios.

    \b
    Example:
      python -m tests.benchmarks trajectory --gb 0.2 --checkpoints 20 --json trajectory.json
    """
    with prepared(**common) as bench:
        inputs = bench.make(set_name, checkpoints)
        compared = bench.outputs / "compared"
        comparing = (
            sys.executable, "-m", "ckptavg", "trajectory", *map(str, inputs.paths),
            "-o", str(compared), "--no-plot", "--json", "--device", bench.device,
        )  # fmt: skip
        contenders = [
            ckptavg(inputs, bench.outputs, bench.device),
            Contender(name="trajectory", commands=(comparing,), output=compared, due_nbytes=0),
        ]
        runs = bench.measure(inputs, contenders)
        click.echo(f"\n{_described(inputs)}, on {bench.device}")
        passes = {
            name: [one.reports[0].get("average_seconds", one.reports[0]["seconds"]) for one in own]
            for name, own in runs.items()
        }
        rows = [
            [name, f"{typical(own):.3f}", f"{median(passes[name]):.3f}", *_memory(own)]
            for name, own in runs.items()
        ]
        _echo_table("run,wall s,pass s,RssAnon MB,device MB", rows)
        of_passes = [
            one / other for one, other in zip(passes["trajectory"], passes["ckptavg"], strict=True)
        ]
        click.echo(
            f"trajectory / average: pass {median(of_passes):.2f}, "
            f"whole process {ratio(runs['trajectory'], runs['ckptavg']):.2f}"
        )


def spread_counts(checkpoints: int, n_schemes: int) -> list[int]:
    """Return ``n_schemes`` different numbers from 2 to ``checkpoints``, evenly spread."""
    return [2 + round((checkpoints - 2) * one / (n_schemes - 1)) for one in range(n_schemes)]


def scheme_contenders(
    inputs: InputSet, outputs: Path, device: str, wanted: Sequence[str]
) -> list[Contender]:
    """Return one average, all in one run, all in runs of their own, and the further writes."""
    single, together = outputs / "single", outputs / "together"
    each = tuple(
        ckptavg_command(inputs, single / str(number), device, [scheme])
        for number, scheme in enumerate(wanted)
    )
    all_in_one = (ckptavg_command(inputs, together, device, wanted),)
    due = len(wanted) * inputs.checkpoint_nbytes
    return [
        ckptavg(inputs, outputs, device),
        Contender(name="m in one", commands=all_in_one, output=together, due_nbytes=due),
        Contender(name="m single", commands=each, output=single, due_nbytes=due),
        peer("writing", inputs, outputs, n_outputs=len(wanted) - 1),
    ]


def _echo_schemes(runs: Runs) -> None:
    one, together, single = runs["ckptavg"], runs["m in one"], runs["m single"]
    written = [run.reports[0]["seconds"] for run in runs["writing"]]
    named = {"one": one, "m in one": together, "m single": single}
    rows = [[name, f"{typical(own):.3f}", *_memory(own)] for name, own in named.items()]
    _echo_table("run,wall s,RssAnon MB,device MB", [*rows, ["writing", f"{median(written):.3f}"]])
    against_writing = [
        run.seconds / (first.seconds + more)
        for run, first, more in zip(together, one, written, strict=True)
    ]
    click.echo(
        f"m in one / (one + writing): median {median(against_writing):.2f}, "
        f"largest {max(against_writing):.2f}\n"
        f"m single / m in one: median {ratio(single, together):.2f}"
    )


def _say(text: str) -> None:
    click.echo(text, err=True)


def _described(inputs: InputSet) -> str:
    size = inputs.checkpoint_nbytes / 1e9
    return f"{inputs.name}, {len(inputs.paths)} checkpoints of {size:.3f} GB"


def _memory(runs: Sequence[Run]) -> list[str]:
    """Return the median peak of host memory and the largest one of device memory, in MB."""
    peaks = [report.get("peak_device_bytes") or 0 for run in runs for report in run.reports]
    device = f"{max(peaks) / 1e6:.0f}" if any(peaks) else "-"
    return [f"{typical(runs, 'anonymous_bytes') / 1e6:.0f}", device]


def _echo_table(header: str, rows: Sequence[Sequence[str]]) -> None:
    titles = header.split(",")
    filled = [[*row, *[""] * (len(titles) - len(row))] for row in (titles, *rows)]
    widths = [max(map(len, column)) for column in zip(*filled, strict=True)]
    for first, *rest in filled:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        click.echo("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def _machine() -> dict[str, Any]:
    """Tell what the numbers were measured on."""
    installed = {one.name.lower(): one.version for one in importlib.metadata.distributions()}
    gpus = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {
            name: installed.get(name)
            for name in ("ckptavg", "torch", "numpy", "safetensors", "mergekit")
        },
        "gpus": gpus.splitlines(),
    }


if __name__ == "__main__":
    main(prog_name="python -m tests.benchmarks")
