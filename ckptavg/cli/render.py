"""Values -> text for people; every name that comes from a file is escaped on the way out."""

import contextlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

import click

from ckptavg.errors import AfterPublishError, OutputError, printable

if TYPE_CHECKING:
    from ckptavg.batchnorm import BnReport
    from ckptavg.pipeline import Prepared
    from ckptavg.results import AverageResult, CheckpointInfo


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


def echo_result(result: "AverageResult", done: str, *, as_json: bool, quiet: bool) -> None:
    """Print what a run did; ``done`` says it in words.

    Raises:
        AfterPublishError: If that fails or is interrupted: the output is there all the same.
    """
    try:
        if as_json:
            echo_json(asdict(result))
            return
        echo_lines(summary_lines(result, done))
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


def size(nbytes: float) -> str:
    """Return a size with three digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


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


def summary_lines(result: "AverageResult", done: str) -> list[str]:
    """Return what a finished run says."""
    rate = result.read_nbytes / max(result.average_seconds, 1e-9)
    peaks = [f"peak memory {size(result.peak_host_bytes)}"] if result.peak_host_bytes else []
    if result.peak_device_bytes is not None:
        peaks.append(f"{size(result.peak_device_bytes)} on {result.device}")
    lines = [
        f"{result.output}: {done}",
        f"  read {size(result.read_nbytes)} at {size(rate)}/s on {result.device}, "
        f"wrote {size(result.written_nbytes)}; "
        + ", ".join([f"{result.seconds:.2f} s in all", *peaks]),
    ]
    if result.differing:
        lines.append(
            f"  {len(result.differing)} integer tensors differed, taken from {result.taken_from}: "
            + _some(result.differing)
        )
    if result.batchnorm is not None and result.batchnorm.layers:
        lines += batchnorm_lines(result.batchnorm)
    return lines


def batchnorm_lines(report: "BnReport") -> list[str]:
    """Return how far each layer's statistics moved."""
    rate = report.n_samples / max(report.seconds, 1e-9)
    lines = [
        f"  BatchNorm: {len(report.layers)} layers recomputed over {report.n_samples} samples in "
        f"{report.n_batches} batches, {report.seconds:.2f} s ({rate:,.0f} samples/s)"
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
    return lines + table(header, rows)


def plan_lines(prepared: "Prepared", output: str) -> list[str]:
    """Return what ``--dry-run`` shows."""
    plan, workspace = prepared.plan, prepared.workspace
    rows = [
        [
            f"  {label}",
            "-" if step is None else str(step),
            "-" if epoch is None else str(epoch),
            f"{coefficient:.6g}",
            size(sum(file.size for file in files)),
        ]
        for label, step, epoch, coefficient, files in zip(
            plan.labels, plan.steps, plan.epochs, plan.rows[0].coefficients, plan.files, strict=True
        )
    ]
    from ckptavg.provenance import tensor_summary

    summary = tensor_summary(plan, None)
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in summary["averaged_dtypes"].items())
    lines = [
        f"would average {plan.n_checkpoints} checkpoints ({plan.rows[0].name}) into {output}; "
        "nothing was read but headers",
        *table(["  checkpoint", "step", "epoch", "coefficient", "size"], rows),
        f"tensors: {summary['averaged']} averaged ({dtypes})",
    ]
    if summary["copied"]:
        lines.append(
            f"  {len(summary['copied'])} integer or bool tensors copied; where checkpoints differ, "
            f"from {plan.labels[plan.take_from]}: {_some(summary['copied'])}"
        )
    for name, owner in summary["tied"].items():
        lines.append(f"  {name}: tied to {owner}, averaged once")
    lines += [
        f"read {size(plan.read_nbytes)}, write {size(plan.total_nbytes)}: "
        + ", ".join(f"{shard.filename} ({size(shard.nbytes)})" for shard in plan.shards),
        f"on {workspace.device}: {workspace.n_threads} threads, chunks of "
        f"{size(workspace.chunk_nbytes)}; buffers at most {size(workspace.host_nbytes)} host, "
        f"{size(workspace.device_nbytes)} device memory",
    ]
    if prepared.run_bn_pass is not None:
        lines.append("then BatchNorm statistics are recomputed: the model fits the average")
    if prepared.side_files:
        names = [file.name for file in prepared.side_files]
        lines.append(f"copy {len(names)} side files: {', '.join(names)}")
    return lines


def plan_json(prepared: "Prepared", output: str) -> dict[str, Any]:
    """Return what ``--dry-run --json`` prints."""
    from ckptavg.provenance import tensor_summary

    plan, workspace = prepared.plan, prepared.workspace
    return {
        "output": output,
        "checkpoints": [
            {
                "source": label,
                "step": step,
                "epoch": epoch,
                "coefficient": coefficient,
                "nbytes": sum(file.size for file in files),
            }
            for label, step, epoch, coefficient, files in zip(
                plan.labels, plan.steps, plan.epochs, plan.rows[0].coefficients, plan.files,
                strict=True,
            )
        ],
        "tensors": tensor_summary(plan, None),
        "read_nbytes": plan.read_nbytes,
        "write_nbytes": plan.total_nbytes,
        "shards": [{"filename": shard.filename, "nbytes": shard.nbytes} for shard in plan.shards],
        "device": workspace.device,
        "host_buffer_nbytes": workspace.host_nbytes,
        "device_buffer_nbytes": workspace.device_nbytes,
        "batchnorm_pass": prepared.run_bn_pass is not None,
        "side_files": [file.name for file in prepared.side_files],
        "notes": [*plan.notes, *prepared.notes],
    }  # fmt: skip


def checkpoint_lines(info: "CheckpointInfo") -> list[str]:
    """Return what ``inspect`` shows of one checkpoint."""
    known = (("step", info.step), ("epoch", info.epoch))
    position = [f"{name} {value}" for name, value in known if value is not None]
    files = f"{len(info.files)} file{'s' if len(info.files) != 1 else ''}"
    lines = [
        f"{info.source}: {', '.join([info.layout, *position])}, {len(info.tensors)} tensors, "
        f"{info.n_parameters:,} values, {size(info.nbytes)} in {files}",
    ]
    lines += [f"  metadata {key}: {value}" for key, value in info.metadata.items()]
    lines += [f"  note: {note}" for note in info.notes]
    rows = [
        [
            f"  {name}",
            str(tensor.dtype),
            "x".join(map(str, tensor.shape)) or "scalar",
            size(tensor.nbytes),
            f"tied to {info.aliases[name]}" if name in info.aliases else "",
        ]
        for name, tensor in info.tensors.items()
    ]
    lines += table(["  tensor", "dtype", "shape", "size", ""], rows)
    lines += [
        f"  {name}: not stored, tied to {owner}"
        for name, owner in info.aliases.items()
        if name not in info.tensors
    ]
    return lines


def checkpoint_json(info: "CheckpointInfo") -> dict[str, Any]:
    """Return what ``inspect --json`` prints of one checkpoint."""
    return {
        "source": info.source,
        "layout": info.layout,
        "step": info.step,
        "epoch": info.epoch,
        "nbytes": info.nbytes,
        "n_parameters": info.n_parameters,
        "files": [{"path": file.path, "nbytes": file.size} for file in info.files],
        "metadata": dict(info.metadata),
        "notes": list(info.notes),
        "aliases": dict(info.aliases),
        "tensors": {
            name: {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "nbytes": tensor.nbytes}
            for name, tensor in info.tensors.items()
        },
    }


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (
        f" and {len(names) - count} more" if len(names) > count else ""
    )
