"""Values -> text for people; every name that comes from a file is escaped on the way out."""

import contextlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TextIO

import click

from ckptavg.errors import AfterPublishError, OutputError, printable
from ckptavg.units import size

if TYPE_CHECKING:
    from ckptavg.batchnorm import BnReport
    from ckptavg.coefficients import CoefficientRow
    from ckptavg.prepare import Prepared
    from ckptavg.results import AverageResult, OutputResult
    from ckptavg.tensors import PushResult


def echo_lines(lines: Iterable[str]) -> None:
    """Print lines to stdout.

    Raises:
        OutputError: If they cannot be printed; a reader that went away is no error.
    """
    _print("".join(f"{printable(line)}\n" for line in lines))


def echo_json(value: Any) -> None:
    """Print a value as JSON to stdout; raises as ``echo_lines`` does."""
    from ckptavg.provenance import json_text

    _print(f"{json_text(value)}\n")


def echo_notes(notes: Sequence[str], *, quiet: bool) -> None:
    """Print notes to stderr, one a line; where nobody can read them, they are lost."""
    if not quiet:
        with contextlib.suppress(OSError):
            for note in notes:
                click.echo(_encodable(f"note: {printable(note)}", sys.stderr), err=True)


def echo_result(
    result: "AverageResult",
    done: str,
    *,
    as_json: bool,
    quiet: bool,
    pushed: "Sequence[PushResult]" = (),
    more: Sequence[str] = (),
    json_fields: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Print what a run did; ``done`` and ``more`` say it to people, the others are for JSON.

    Raises:
        AfterPublishError: If that fails or is interrupted: the output is there all the same.
    """
    try:
        if as_json:
            told = asdict(result) | {"pushed": [asdict(one) for one in pushed]}
            echo_json({**told, **json_fields})
            return
        echo_lines([*summary_lines(result, done, evaluated=not more), *more])
        echo_notes(result.notes, quiet=quiet)
    except BaseException as error:
        raise AfterPublishError(
            f"{result.output}: is published and whole, but then: "
            f"{str(error) or type(error).__name__}"
        ) from error


def echo_plan(prepared: "Prepared", output: str, *, as_json: bool, quiet: bool) -> None:
    """Print what a run would do."""
    if as_json:
        echo_json(plan_json(prepared, output))
        return
    echo_lines(plan_lines(prepared, output))
    echo_notes([*prepared.plan.notes, *prepared.notes], quiet=quiet)


def stdout_for_the_result() -> contextlib.AbstractContextManager[object]:
    """Send what the user's code prints to stderr: stdout belongs to the result."""
    return contextlib.redirect_stdout(sys.stderr)


def _print(text: str) -> None:
    try:
        click.echo(_encodable(text, sys.stdout), nl=False)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        pass
    except OSError as error:
        raise OutputError(f"the result cannot be printed: {error.strerror}") from error


def _encodable(text: str, stream: TextIO) -> str:
    """Escape what the stream's encoding cannot express."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with the columns aligned; the first to the left, the others to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]


def summary_lines(result: "AverageResult", done: str, *, evaluated: bool = True) -> list[str]:
    """Return what a finished run says, with or without what the evaluation says of its outputs."""
    from ckptavg.schemes import shortened

    peaks = [f"peak memory {size(result.peak_host_bytes)}"] if result.peak_host_bytes else []
    if result.peak_device_bytes is not None:
        peaks.append(f"{size(result.peak_device_bytes)} on {result.device}")
    processes = f", {result.n_processes} processes" if result.n_processes > 1 else ""
    read_nbytes = result.read_nbytes - result.resumed_nbytes
    rate = _rate(read_nbytes, result.average_seconds)
    lines = [
        f"{result.output}: {done}",
        f"  read {size(read_nbytes)} at {rate} on {result.device}{processes}, "
        f"wrote {size(result.written_nbytes)}; "
        + ", ".join([f"{result.seconds:.2f} s in all", *peaks]),
    ]
    times = result.times
    if times.read_seconds + times.arithmetic_seconds + times.write_seconds:  # measured apart
        lines.append(f"  {_times(result)}")
    for one in result.outputs:
        if len(result.outputs) > 1:
            n_used = sum(coefficient != 0 for coefficient in one.coefficients)
            lines.append(f"  {one.path}: {shortened(one.scheme)}, {n_used} checkpoints")
        if one.differing:
            lines.append(
                f"  {len(one.differing)} integer tensors differed, taken from {one.taken_from}: "
                + _some(one.differing)
            )
        if one.batchnorm is not None and one.batchnorm.layers:
            lines += batchnorm_lines(one.batchnorm)
        if evaluated:
            lines += evaluation_lines(one)
    return lines


def _times(result: "AverageResult") -> str:
    """Say where the time went; the stages overlap."""
    times = result.times
    read_nbytes = result.read_nbytes - result.resumed_nbytes
    share = read_nbytes / max(result.read_nbytes, 1)
    stages = [
        ("reading", times.read_seconds, read_nbytes),
        ("arithmetic", times.arithmetic_seconds, read_nbytes),
        ("writing", times.write_seconds, result.written_nbytes * share),
        ("syncing", times.publish_seconds, result.written_nbytes),
    ]
    told = [
        f"{name} {seconds:.2f} s ({_rate(nbytes, seconds)})" for name, seconds, nbytes in stages
    ]
    return f"{', '.join(told)}; bottleneck: {times.bottleneck}"


def _rate(nbytes: float, seconds: float) -> str:
    return f"{size(nbytes / max(seconds, 1e-9))}/s"


def batchnorm_lines(report: "BnReport") -> list[str]:
    """Return how far each layer's statistics moved."""
    rate = report.n_samples / max(report.seconds, 1e-9)
    how = "" if report.estimator == "population" else f" by the estimator '{report.estimator}'"
    lines = [
        f"  BatchNorm: {len(report.layers)} layers recomputed{how} over {report.n_samples} samples "
        f"in {report.n_batches} batches, {report.seconds:.2f} s ({rate:,.0f} samples/s)"
    ]
    rows = [
        [
            f"    {layer.name or '(the model itself)'}",
            str(layer.n_features),
            f"{layer.mean_shift:.3g} sd",
            f"{layer.variance_ratio[0]:.3g} to {layer.variance_ratio[1]:.3g}",
        ]
        for layer in report.layers
    ]
    header = ["    layer", "channels", "mean moved by up to", "variance changed by a factor of"]
    lines += table(header, rows)
    if report.convergence is not None:
        lines.append(
            f"    the last {report.convergence.share:.0%} of the data moved no mean by more than "
            f"{report.convergence.change:.2g} sd, no variance by more than "
            f"{report.convergence.change:.2%}"
        )
    return lines


def evaluation_lines(output: "OutputResult") -> list[str]:
    """Return what the evaluation says of a model, and of what it is compared with."""
    if output.metrics is None:
        return []
    rows = [(row.name, row.metrics) for row in output.comparison] or [("model", output.metrics)]
    return metrics_table("  evaluation", rows)


def metrics_table(title: str, rows: Sequence[tuple[str, Mapping[str, float]]]) -> list[str]:
    """Return lines with a row for each name, and a column for each metric."""
    names = list(dict.fromkeys(name for _, metrics in rows for name in metrics))
    return table(
        [title, *names],
        [[f"  {name}", *(f"{one.get(key, math.nan):.6g}" for key in names)] for name, one in rows],
    )


def plan_lines(prepared: "Prepared", output: str) -> list[str]:
    """Return what ``--dry-run`` shows."""
    plan, workspace = prepared.plan, prepared.workspace
    rows = [
        [
            f"  {plan.labels[index]}",
            "-" if plan.steps[index] is None else str(plan.steps[index]),
            "-" if plan.epochs[index] is None else str(plan.epochs[index]),
            *(_coefficient(one.row, index) for one in plan.outputs),
            size(sum(file.size for file in plan.files[index])),
        ]
        for index in range(plan.n_checkpoints)
    ]
    from ckptavg.coefficients import GaussianNoise
    from ckptavg.provenance import tensor_summary
    from ckptavg.schemes import shortened

    summary = tensor_summary(plan, plan.outputs[0], None)
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in summary["averaged_dtypes"].items())
    several = len(plan.outputs) > 1
    what = f"{len(plan.outputs)} averages" if several else shortened(str(plan.outputs[0].scheme))
    coefficients = [one.name for one in plan.outputs] if several else ["coefficient"]
    lines = [
        f"would average {plan.n_checkpoints} checkpoints ({what}) into {output}; "
        "nothing was read but headers",
        *table(["  checkpoint", "step", "epoch", *coefficients, "size"], rows),
        *(
            f"{one.name or 'average'}: {one.row.statistic_name} is added"
            for one in plan.outputs
            if isinstance(one.row.statistic, GaussianNoise)
        ),
        f"tensors: {summary['averaged']} averaged" + (f" ({dtypes})" if dtypes else ""),
    ]
    if summary["copied"]:
        names = dict.fromkeys(plan.labels[one.take_from] for one in plan.outputs)
        lines.append(
            f"  {len(summary['copied'])} integer or bool tensors copied; where checkpoints differ, "
            f"from {', '.join(names)}: {_some(summary['copied'])}"
        )
    for kind, modules in summary["derived"].items():
        lines.append(f"  {len(modules)} modules computed as {kind}: {_some(modules)}")
    for name, owner in summary["tied"].items():
        lines.append(f"  {name}: tied to {owner}, averaged once")
    each = " for each average" if several else ""
    lines += [
        f"read {size(plan.read_nbytes)}, write {size(plan.write_nbytes)}: "
        + ", ".join(f"{shard.filename} ({size(shard.nbytes)})" for shard in plan.shards)
        + each,
        f"on {workspace.device}: {workspace.n_threads} threads, chunks of "
        f"{size(workspace.chunk_nbytes)}; buffers of {size(workspace.host_nbytes)} host, "
        f"{size(workspace.device_nbytes)} device memory",
    ]
    if workspace.max_threads > workspace.n_threads:
        lines.append(
            f"  where reading waits for the storage, up to {workspace.max_threads} threads and "
            f"{size(workspace.max_host_nbytes)}"
        )
    if prepared.run_bn_pass is not None:
        live = prepared.live
        recomputes = live is not None and live.options.batches is not None
        what = "BatchNorm statistics are recomputed" if recomputes else "it is evaluated"
        lines.append(f"then {what}: the model fits the average")
    side_files = sorted({file.name for files in prepared.side_files for file in files})
    if side_files:
        lines.append(f"copy {len(side_files)} side files: {', '.join(side_files)}")
    return lines


def plan_json(prepared: "Prepared", output: str) -> dict[str, Any]:
    """Return what ``--dry-run --json`` prints."""
    from ckptavg.provenance import tensor_summary

    plan, workspace = prepared.plan, prepared.workspace
    return {
        "output": output,
        "outputs": [
            {
                "name": one.name,
                "scheme": str(one.scheme),
                "coefficients": one.row.told_coefficients,
                "statistic": one.row.statistic_name,
                "tensors": tensor_summary(plan, one, None),
                "side_files": [file.name for file in files],
            }
            for one, files in zip(plan.outputs, prepared.side_files, strict=True)
        ],
        "checkpoints": [
            {
                "source": plan.labels[index],
                "step": plan.steps[index],
                "epoch": plan.epochs[index],
                "nbytes": sum(file.size for file in plan.files[index]),
            }
            for index in range(plan.n_checkpoints)
        ],
        "read_nbytes": plan.read_nbytes,
        "write_nbytes": plan.write_nbytes,
        "shards": [{"filename": shard.filename, "nbytes": shard.nbytes} for shard in plan.shards],
        "device": workspace.device,
        "n_threads": workspace.n_threads,
        "max_threads": workspace.max_threads,
        "host_buffer_nbytes": workspace.host_nbytes,
        "max_host_buffer_nbytes": workspace.max_host_nbytes,
        "device_buffer_nbytes": workspace.device_nbytes,
        "batchnorm_pass": prepared.live is not None and prepared.live.options.batches is not None,
        "notes": [*plan.notes, *prepared.notes],
    }


def _coefficient(row: "CoefficientRow", index: int) -> str:
    told = row.told_coefficients[index]
    return str(row.statistic_name) if told is None else f"{told:.6g}"


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (
        f" and {len(names) - count} more" if len(names) > count else ""
    )
