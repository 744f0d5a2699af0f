"""A process that has ckptavg loaded, and forks a fresh command line for each request.

Starting Python and importing takes ten times what averaging a small checkpoint does; a sweep over
every system call needs thousands of runs. The child is a process of its own in all that matters:
signal handlers, standard streams, limits, exit code. See ``faults.runs``, which asks.
"""

import contextlib
import importlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from ckptavg import blocks

_LIMITS = {
    "data": resource.RLIMIT_DATA,
    "data_margin": resource.RLIMIT_DATA,  # above what the process has when it begins
    "fsize": resource.RLIMIT_FSIZE,
}


def main() -> None:
    """Load ckptavg by running it once with this process's arguments, then answer requests."""
    from ckptavg.cli import run

    for name in filter(None, os.environ["FAULTS_LOADS"].split(",")):
        importlib.import_module(name)
    answers = os.dup(1)  # what a command prints goes elsewhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if run(sys.argv[1:]) != 0:
        sys.exit("the fork server cannot run ckptavg")
    _tell(answers, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        go_read, go_write = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(go_write)
            _serve(request, go_read)
        os.close(go_read)
        _tell(answers, {"process": process})
        sys.stdin.readline()
        started = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # a signal was faster
            os.write(go_write, b"g")
        os.close(go_write)
        _, status, usage = os.wait4(process, 0)
        _tell(
            answers,
            {
                "code": os.waitstatus_to_exitcode(status),
                "seconds": time.monotonic() - started,
                "cpu_seconds": usage.ru_utime + usage.ru_stime,
                "peak_rss_bytes": usage.ru_maxrss * 1024,
            },
        )


def _serve(request: dict[str, Any], go: int) -> NoReturn:
    """Become what was asked for, and run the command line when told to go."""
    os.setsid()
    if request["block_nbytes"] is not None:
        blocks.BLOCK_NBYTES = request["block_nbytes"]
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if request[name] is None:
            os.close(descriptor)
            setattr(sys, name, None)  # as Python starts with a closed one
            continue
        flags = os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(request[name], flags, 0o666), descriptor)
    sys.argv[1:] = request["arguments"]
    os.read(go, 1)
    os.close(go)
    for name, value in request["limits"].items():
        limit = _data_bytes() + value if name == "data_margin" else value
        resource.setrlimit(_LIMITS[name], (limit, limit))
    from ckptavg.cli import main as command_line

    code = 1
    try:
        command_line()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _data_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmData:")[2].split()[0]) * 1024


def _tell(answers: int, value: dict[str, Any]) -> None:
    os.write(answers, json.dumps(value).encode() + b"\n")


if __name__ == "__main__":
    main()
