"""The command line: a thin shell over ``ckptavg.pipeline``; errors become one line and a code.

Exit codes: 0 done; 1 refused or failed, nothing published; 2 usage; 3 published, but a later step
failed; 129, 130, 143 ended by SIGHUP, SIGINT, SIGTERM, nothing published.
"""

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

import click

from ckptavg._version import __version__
from ckptavg.errors import AfterPublishError, CkptavgError, UsageError, printable

# command -> module that holds it as `command`; imported when it is needed
_COMMANDS = {
    "average": "ckptavg.cli.average",
    "recompute-bn": "ckptavg.cli.recompute_bn",
    "inspect": "ckptavg.cli.inspect",
}


class _LazyGroup(click.Group):
    """Commands in the order of use, each imported only when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = _COMMANDS.get(cmd_name)
        if module is None:
            return None
        command: click.Command = importlib.import_module(module).command
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ckptavg")
def cli() -> None:
    """Turn the checkpoints a training run left behind into one better model.

    ckptavg averages saved checkpoints tensor by tensor in bounded memory, recomputes BatchNorm
    statistics over your data, and writes a complete safetensors model directory.
    """


class _Ended(BaseException):
    """A signal asked the process to end; not an Exception, so that nothing swallows it."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        self.signal_name = signal.Signals(number).name


def main() -> None:
    """Run the command line and exit; the console script."""
    code = run()
    try:
        sys.stdout.flush()
    except OSError:  # a closed or full standard output must not turn success into failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: What follows ``ckptavg``; None takes it from ``sys.argv``.
    """
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [(number, signal.signal(number, _end)) for number in numbers]
    try:
        code = cli.main(
            None if arguments is None else list(arguments),
            prog_name="ckptavg",
            standalone_mode=False,
        )
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except _Ended as error:
        return _fail(f"ended by {error.signal_name}; nothing was published", error.exit_code, debug)
    except MemoryError:
        return _fail("out of memory; nothing was published (--memory lowers the need)", 1, debug)
    except CkptavgError as error:
        return _fail(str(error), exit_code_of(error), debug)
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def exit_code_of(error: CkptavgError) -> int:
    """Return the documented exit code of an error."""
    if isinstance(error, UsageError):
        return 2
    return 3 if isinstance(error, AfterPublishError) else 1


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    click.echo(f"ckptavg: error: {printable(message)}", err=True)
    return code


def _end(number: int, frame: FrameType | None) -> None:
    raise _Ended(number)
