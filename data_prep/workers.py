"""Independent tasks on several processes, with live progress, signals and dead workers accounted for."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait as wait_for_connection
from typing import Any

from dino_depth.errors import Interrupted, ReportedError

__all__ = ["available_cores", "run_tasks"]

Tick = Callable[[int], None]
POLL_SECONDS = 0.2
AHEAD = 4  # tasks of each worker that are submitted


class _Stopped(Exception):
    """Raised inside a task to leave it between two maps."""


def available_cores() -> int:
    """The cores this process may run on; in a Slurm job no more than it was given, even where nothing binds it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))


def run_tasks(function: Callable[[Any, Tick], Any], tasks: Sequence[Any], workers: int, advance: Tick) -> Iterator[Any]:
    """Yields ``function(task, tick)`` for every task, in the order in which they finish.

    Args:
        function: importable by name; it calls ``tick(n)`` with each ``n`` pieces of work done.
        workers: processes; 0 is one per core. One worker, or one task, runs in this process.
        advance: told of the pieces of work done, here.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived; every task ended between two pieces of work.
        ReportedError: a worker was killed.
    """
    workers = min(workers or available_cores(), len(tasks))
    with _signals() as stopped:
        try:
            if workers <= 1:
                yield from _run_here(function, tasks, advance, stopped)
            else:
                yield from _run_in_pool(function, tasks, workers, advance, stopped)
        except _Stopped:
            raise Interrupted("stopped; run the same command again to continue") from None


def _run_here(function, tasks, advance, stopped: threading.Event) -> Iterator[Any]:
    def tick(done: int):
        if stopped.is_set():
            raise _Stopped
        advance(done)

    for task in tasks:
        yield function(task, tick)


def _run_in_pool(function, tasks, workers: int, advance, stopped: threading.Event) -> Iterator[Any]:
    # Spawned workers inherit neither locks nor threads of this process.
    context = multiprocessing.get_context("spawn")
    shown = 0
    with _held_back(signal.SIGUSR2):  # also starts the process that keeps track of semaphores
        stop, done = context.Event(), context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, _begin_worker, (stop, done)) as pool:
        try:
            # A few ahead: waiting for all of them at once would take the square of their number.
            waiting, pending = iter(tasks), set()
            while True:
                with _held_back(signal.SIGUSR2):
                    ahead = islice(waiting, AHEAD * workers - len(pending))
                    pending |= {pool.submit(_run_in_worker, function, task) for task in ahead}
                if not pending:
                    break
                finished, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
                if stopped.is_set():
                    raise _Stopped
                advance(done.value - shown)
                shown = done.value
                for future in finished:
                    yield future.result()
        except BrokenProcessPool:
            # A signal to the whole process group ends the workers; the one to this process may arrive a moment later.
            if stopped.wait(POLL_SECONDS):
                raise _Stopped from None
            raise ReportedError(
                "a worker process was killed (out of memory?); run the same command again to continue"
            ) from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


@contextmanager
def _held_back(number: int) -> Iterator[None]:
    """Holds a signal back until the end; processes that start meanwhile never hear it.

    Slurm's warning that the time is up reaches every process of a task, and would kill all but the one that expects it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_stop: Any = None
_done: Any = None


def _begin_worker(stop: Any, done: Any):
    global _stop, _done
    _stop, _done = stop, done
    # Ctrl-C reaches the whole process group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """Workers wait for tasks for ever; one whose parent was killed must not."""
    wait_for_connection([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _run_in_worker(function: Callable[[Any, Tick], Any], task: Any) -> Any:
    return function(task, _tick_in_worker)


def _tick_in_worker(done: int):
    if _stop.is_set():
        raise _Stopped
    with _done.get_lock():
        _done.value += done


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second acts as if there were no handler."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: Any):
        stopped.set()
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
