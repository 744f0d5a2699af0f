"""The command line: a thin shell over ``ckptavg.pipeline``; errors become one line and a code.

Exit codes: 0 done; 1 refused or failed, nothing published; 2 usage; 3 published, but a later step
failed; 129, 130, 143 ended by SIGHUP, SIGINT, SIGTERM, nothing published.
"""

import _thread
import contextlib
import importlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any

import click

from ckptavg._version import __version__
from ckptavg.errors import (
    AfterPublishError,
    CkptavgError,
    UsageError,
    is_nul,
    printable,
    storage_error,
    without_token,
)
from ckptavg.staging import published

TYPED = "ckptavg.typed"  # where click's context keeps the arguments of a command as typed
_SEND_AGAIN_SECONDS = 0.001
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")

# command -> module that holds it as `command`; imported when it is needed
_COMMANDS = {
    "average": "ckptavg.cli.average",
    "recompute-bn": "ckptavg.cli.recompute_bn",
    "sweep": "ckptavg.cli.sweep",
    "soup": "ckptavg.cli.soup",
    "tune": "ckptavg.cli.tune",
    "plane": "ckptavg.cli.plane",
    "width": "ckptavg.cli.width",
    "path": "ckptavg.cli.path",
    "ensemble": "ckptavg.cli.ensemble",
    "inspect": "ckptavg.cli.inspect",
    "trajectory": "ckptavg.cli.trajectory",
    "push": "ckptavg.cli.push",
    "run": "ckptavg.cli.run_recipe",
    "report": "ckptavg.cli.report",
    "verify": "ckptavg.cli.verify",
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

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Keep what was typed: ``--save-recipe`` writes it down."""
        found = super().resolve_command(ctx, args)
        ctx.meta[TYPED] = tuple(found[2])
        return found


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
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def main() -> None:
    """Run the command line and exit; the console script."""
    # a standard stream that was closed before the start is None: write to nowhere instead
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - kept open to the end
    code = run(ends_process=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # what could not be printed was dealt with where it was printed
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def run(arguments: Sequence[str] | None = None, *, ends_process: bool = False) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: What follows ``ckptavg``; None takes it from ``sys.argv``.
        ends_process: Whether nothing follows: a signal then changes nothing any more.
    """
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    handlers = _catch_signals()
    published.clear()
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
        with contextlib.suppress(OSError):
            error.show()
        return 2
    except click.Abort:  # what click makes of a KeyboardInterrupt
        return _fail_ended("interrupted", 130, debug)
    except _Ended as error:
        return _fail_ended(str(error), error.exit_code, debug, _notes(error))
    except MemoryError:
        return _fail("out of memory; nothing was published (--memory lowers the need)", 1, debug)
    except CkptavgError as error:
        return _fail(f"{error}{_notes(error)}", exit_code_of(error), debug)
    except OSError as error:
        return _fail(str(storage_error(error)), 1, debug)
    except Exception as error:
        if isinstance(error, ValueError) and is_nul(error):  # click looks at paths, too
            return _fail("a path holds a NUL byte", 2, debug)
        hint = "" if debug else " (--debug shows the traceback; please report it)"
        return _fail(f"unexpected {type(error).__name__}: {error}{hint}", 1, debug)
    finally:
        for number, handler in handlers:
            signal.signal(number, signal.SIG_IGN if ends_process else handler)


def exit_code_of(error: CkptavgError) -> int:
    """Return the documented exit code of an error."""
    if isinstance(error, UsageError):
        return 2
    return 3 if isinstance(error, AfterPublishError) else 1


def _notes(error: BaseException) -> str:
    """Return what was found out about an error on its way up, such as how to go on."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        # an address may be signed
        sys.stderr.write(_QUERY.sub(r"\1?...", without_token(traceback.format_exc())))
    with contextlib.suppress(OSError):
        click.echo(f"ckptavg: error: {printable(message)}", err=True)
    return code


def _takes_a_lock(frame: FrameType) -> bool:
    """Tell whether a condition or semaphore is entered or left at this moment."""
    code = frame.f_code
    return code.co_filename == threading.__file__ and code.co_name in ("__enter__", "__exit__")


def _send_again(number: int) -> None:
    time.sleep(_SEND_AGAIN_SECONDS)
    main_thread = threading.main_thread().ident
    if main_thread is not None:
        signal.pthread_kill(main_thread, number)


def _fail_ended(how: str, code: int, debug: bool, notes: str = "") -> int:
    """Tell that a signal ended the run, and whether anything was published before."""
    there = [target for target in published if os.path.lexists(target)]
    if there:
        return _fail(f"{there[0]}: is published and whole, but then: {how}{notes}", 3, debug)
    return _fail(f"{how}; nothing was published{notes}", code, debug)


def _catch_signals() -> list[tuple[signal.Signals, Any]]:
    """Let signals end the run in order; return what handled them before.

    One that is ignored, as under nohup, stays ignored. The first one makes the clean-up deaf to
    those that follow. Processes that a data loader forks die of them as usual. One that comes while
    a lock of Python's own library is taken or let go is sent again: raised there, it would leave
    the lock held, and the clean-up could wait for it for ever.
    """
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            os._exit(128 + number)
        if frame is not None and _takes_a_lock(frame):
            _thread.start_new_thread(_send_again, (number,))
            return
        for caught, _ in handlers:
            signal.signal(caught, signal.SIG_IGN)
        raise _Ended(number)

    handlers = [
        (number, signal.getsignal(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    for number, _ in handlers:
        signal.signal(number, end)
    return handlers
