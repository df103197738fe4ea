"""Run tasks side by side, each in a process of its own on one thread; one that dies dies alone."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any, NamedTuple, Protocol

import torch

from cradle_pyro.threads import torch_threads_kept

__all__ = ["NO_REASON", "Failure", "Task", "run_tasks"]

NO_REASON = "it ended without a reason"
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
_PRELOADED = ("cradle_pyro.evaluation.jobs", "cradle_pyro.inference.train", "scanpy")
_KILLED = -9


class Failure(NamedTuple):
    """What failed, and why in one line."""

    name: str
    reason: str


class Task(Protocol):
    """Work that leaves its results on disk."""

    @property
    def names(self) -> list[str]:
        """Name of each part."""
        ...

    def run(self) -> None:
        """Do it; a part that fails writes its reason down."""
        ...

    def forget(self) -> None:
        """Forget why it failed before."""
        ...

    def failures(self) -> Iterator[Failure]:
        """Yield the parts without a result, after it ran."""
        ...


def run_tasks(
    tasks: Sequence[Task], workers: int, advance: Callable[[], object]
) -> Iterator[Failure]:
    """Run tasks, `workers` at a time, each in a process of its own; yield what failed.

    Parameters
    ----------
    tasks
        What to do.
    workers
        Processes at a time; 0 for this process.
    advance
        Called once for each part of a task that ended.
    """
    if workers == 0:
        for task in tasks:
            task.forget()
            with _one_torch_thread():
                _run_quietly(task)
            yield from _ended(task, 0, advance)
        return
    waiting = list(tasks)[::-1]
    running: dict[Any, tuple[Any, Task]] = {}
    context = _context()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                task = waiting.pop()
                task.forget()
                process = context.Process(target=_run_in_child, args=(task,), daemon=True)
                with _one_thread_environment():
                    process.start()
                running[process.sentinel] = (process, task)
            for sentinel in connection.wait(list(running)):
                process, task = running.pop(sentinel)
                process.join()
                yield from _ended(task, process.exitcode, advance)
                process.close()
    finally:
        for process, _ in running.values():
            process.kill()


def _ended(task: Task, exit_code: int, advance: Callable[[], object]) -> Iterator[Failure]:
    for _ in task.names:
        advance()
    for failure in task.failures():
        if failure.reason == NO_REASON and exit_code < 0:
            why = f"its process was ended by signal {-exit_code}"
            why += " (too little memory?)" if exit_code == _KILLED else ""
            failure = failure._replace(reason=why)
        elif failure.reason == NO_REASON and exit_code > 0:
            failure = failure._replace(reason=f"its process ended with exit code {exit_code}")
        yield failure


def _context() -> Any:
    """Return a way to start processes that have the libraries loaded and nothing else."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def _run_in_child(task: Task) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)  # nobody waits for the result

        threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)
    _run_quietly(task)


def _run_quietly(task: Task) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task.run()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    with torch_threads_kept():
        torch.set_num_threads(1)
        yield


@contextmanager
def _one_thread_environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
