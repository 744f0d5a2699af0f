"""``ckptavg verify``: is an output what its provenance says, and does it reproduce."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckptavg.cli.options import talk_options
from ckptavg.cli.render import echo_json, echo_lines, echo_notes
from ckptavg.errors import VerificationError

if TYPE_CHECKING:
    from ckptavg.verify import VerifyResult

_EPILOG = """\b
Examples:
  ckptavg verify swa
  ckptavg verify averages/* --json
  ckptavg verify swa-bn --reproduce --trust-code
"""


@click.command("verify", epilog=_EPILOG)
@click.argument("outputs", nargs=-1, required=True, metavar="OUT...")
@click.option(
    "--reproduce",
    is_flag=True,
    help="Make the output again from its sources, beside it, and compare byte for byte; what was "
    "made is removed.",
)
@click.option(
    "--trust-code",
    is_flag=True,
    help="With --reproduce: import and call the model and data that ckptavg.json names.",
)
@click.option(
    "--device",
    metavar="auto|cpu|cuda[:i]",
    help="Where it is made again, for example cuda:1; default: auto, after a BatchNorm pass that "
    "of the pass.",
)
@talk_options
def command(
    outputs: tuple[str, ...],
    reproduce: bool,
    trust_code: bool,
    device: str | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Compare model directories with what their ckptavg.json says of them.

    Every file must have its size and SHA-256, and the checkpoints that went in must be as they
    were; those that are gone are told, but the output is whole without them.
    """
    from ckptavg.verify import result_json, verify_output

    if (trust_code or device is not None) and not reproduce:
        raise click.UsageError("--trust-code and --device belong to --reproduce")
    results = []
    for output in _models(outputs, quiet=quiet):
        result = verify_output(
            output,
            reproduce=reproduce,
            trust_code=trust_code,
            device=device,
            shows_progress=sys.stderr.isatty() and not (quiet or as_json),
        )
        results.append(result)
        if not as_json:
            echo_lines(_lines(result))
            echo_notes([f"{output}: {note}" for note in result.notes], quiet=quiet)
    if as_json:
        told = [result_json(result) for result in results]
        echo_json(told[0] if len(told) == 1 else told)
    failed = [result for result in results if not result.ok]
    if failed:
        problems = [problem for result in failed for problem in result.problems]
        more = f"; {len(problems)} problems in all" if len(problems) > 1 else ""
        raise VerificationError(f"{failed[0].output}: {problems[0]}{more}")


def _models(outputs: Sequence[str], *, quiet: bool) -> list[str]:
    """Return the model directories that are meant: a directory of several stands for all."""
    models, skipped = list[str](), list[str]()
    for output in outputs:
        inside = sorted(path.parent for path in Path(output).glob("*/ckptavg.json"))
        if Path(output).is_file() and len(outputs) > 1:
            skipped.append(f"{output}: passed over, it is no model directory")
        elif inside and not Path(output, "ckptavg.json").exists():
            models += map(str, inside)
        else:
            models.append(output)
    echo_notes(skipped, quiet=quiet)
    if not models:
        raise VerificationError(f"{outputs[0]}: is no model directory")
    return models


def _lines(result: "VerifyResult") -> list[str]:
    """Return one line for each thing that is not as recorded or was made again, and a last one."""
    from ckptavg.verify import difference_text

    lines = [f"{result.output}: {problem}" for problem in result.problems]
    for one in result.reproduced or ():
        if one.is_identical:
            lines.append(f"{result.output}: {one.name}: made again, identical")
        elif one.differing:
            lines += [
                f"{result.output}: {one.name}: '{tensor.name}' differs in {tensor.n_differing} of "
                f"{tensor.numel} elements"
                for tensor in one.differing
            ]
        else:
            lines.append(f"{result.output}: {one.name}: {difference_text(one)}")
    return [*lines, f"{result.output}: {_summary(result)}"]


def _summary(result: "VerifyResult") -> str:
    n_whole = sum(one.state == "as written" for one in result.files)
    parts = [f"{_of(n_whole, len(result.files), 'file')} as written"]
    n_unchanged = sum(one.state == "unchanged" for one in result.sources)
    parts.append(f"{_of(n_unchanged, len(result.sources), 'source')} unchanged")
    for state in ("missing", "not checked"):
        count = sum(one.state == state for one in result.sources)
        parts += [f"{count} {state}"] if count else []
    if result.reproduced is not None:
        is_same = all(one.is_identical for one in result.reproduced)
        parts.append("reproduced bit for bit" if is_same else "not reproduced")
    return ", ".join(parts)


def _of(count: int, total: int, what: str) -> str:
    plural = "" if total == 1 else "s"
    return f"{count} {what}{plural}" if count == total else f"{count} of {total} {what}{plural}"
