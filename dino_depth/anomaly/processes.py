"""One function in several processes at once, each with arguments of its own; the first failure ends them all."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from dino_depth.errors import ReportedError

__all__ = ["run_processes"]


def run_processes(function: Callable[..., Any], calls: Sequence[tuple]):
    """Returns when ``function(*arguments)`` has returned for all ``calls``, each in a process of its own.

    The processes share the cores: each has its part of this one's threads.

    Args:
        function: importable by name, not from ``__main__``.

    Raises:
        ReportedError: what one of them raised, or one was killed or failed otherwise; the others are ended first.
    """
    # Spawned processes inherit neither locks nor threads of this one.
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // max(1, len(calls)))
    running: dict[int, tuple[Any, Connection]] = {}
    try:
        for arguments in calls:
            heard, said = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(said, function, arguments, threads))
            process.start()
            said.close()
            running[process.sentinel] = process, heard
        while running:
            for sentinel in wait(list(running)):
                process, heard = running[sentinel]
                process.join()
                if heard.poll():  # also true at its end, where nothing was said
                    try:
                        raise heard.recv()
                    except EOFError:
                        pass
                if process.exitcode:
                    how = "was killed (out of memory?)" if process.exitcode < 0 else "failed"
                    raise ReportedError(f"a process {how}: run the same command again to continue")
                del running[sentinel]
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def _run(said: Connection, function: Callable[..., Any], arguments: tuple, threads: int):
    # Ctrl-C reaches the whole process group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        function(*arguments)
    except ReportedError as error:
        said.send(error)


def _end_with_parent():
    """A process whose parent was killed would go on alone, beside the run that is started next."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
