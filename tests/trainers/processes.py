"""New processes on this machine; several are told of each other as torchrun would."""

import multiprocessing
import multiprocessing.connection
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any


def start(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call ``work(*arguments)`` in so many new processes, and wait until all are done.

    Raises:
        RuntimeError: If one of them fails; the others are ended.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = []
    for rank in range(size):
        environment = {} if size == 1 else {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0",
            "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        }  # fmt: skip
        process = context.Process(target=_call, args=(environment, work, arguments))
        process.start()
        processes.append(process)
    running = list(processes)
    while running:
        multiprocessing.connection.wait([process.sentinel for process in running])
        running = [process for process in running if process.exitcode is None]
        if any(process.exitcode for process in processes):
            for process in running:
                process.terminate()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a process failed")


def _call(
    environment: Mapping[str, str], work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    work(*arguments)
