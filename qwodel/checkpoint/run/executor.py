"""Running independent tasks in this process, or in a pool of them."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch

from qwodel.algorithms.determinism import compute_threads
from qwodel.checkpoint.run.crew import Crew
from qwodel.children import safe_spawning
from qwodel.exceptions import ConfigurationError, ConversionError
from qwodel.exhaustion import exhaustion

__all__ = ["Executor", "ProcessExecutor", "SerialExecutor", "ThreadExecutor", "Worker"]

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")
TaskT_contra = TypeVar("TaskT_contra", contravariant=True)
ResultT_co = TypeVar("ResultT_co", covariant=True)


_KEPT_BYTES = 16 << 20


class Worker(AbstractContextManager[Any], Protocol[TaskT_contra, ResultT_co]):
    """Does tasks one after another; opened once in each process."""

    def __call__(self, task: TaskT_contra, /) -> ResultT_co:
        """Do one task."""


class Executor(Protocol):
    """Runs every task through a worker and yields results as they come, in any order.

    Closing the generator stops the work.
    """

    def run(
        self, factory: Callable[[], Worker[TaskT, ResultT]], tasks: Iterable[TaskT]
    ) -> Generator[ResultT, None, None]:
        """Yield the results of all tasks; each process opens one worker from ``factory``."""


@dataclass(frozen=True, slots=True)
class SerialExecutor:
    """One task after another, here."""

    def run(
        self, factory: Callable[[], Worker[TaskT, ResultT]], tasks: Iterable[TaskT]
    ) -> Generator[ResultT, None, None]:
        """Yield results in the order of the tasks."""
        with factory() as worker:
            for task in tasks:
                yield worker(task)


@dataclass(frozen=True, slots=True)
class ThreadExecutor:
    """A few threads, each with a worker of its own that computes on one core.

    torch's own threads meet after every operation, which on small pieces costs more
    than it gains, and on a busy machine costs a multiple.

    Attributes:
        threads: how many.
    """

    threads: int

    def run(
        self, factory: Callable[[], Worker[TaskT, ResultT]], tasks: Iterable[TaskT]
    ) -> Generator[ResultT, None, None]:
        """See :class:`Executor`.

        Raises:
            ResourceError: memory ran out, or the system starts no more threads.
        """
        waiting = iter(list(tasks))
        done: queue.SimpleQueue[ResultT | _Ended] = queue.SimpleQueue()
        lock, stopped = threading.Lock(), threading.Event()

        def work() -> None:
            with exhaustion("working on tensors"), compute_threads(1), factory() as worker:
                _keep_freed_memory()
                while not stopped.is_set():
                    with lock:
                        tasks_left = list(islice(waiting, 1))
                    if not tasks_left:
                        break
                    done.put(worker(tasks_left[0]))

        crew = Crew()
        try:
            with exhaustion("starting threads"):
                for _ in range(self.threads):
                    crew.start("qwodel-work", work, lambda error: done.put(_Ended(error)))
            running = self.threads
            while running:
                outcome = done.get()
                if not isinstance(outcome, _Ended):
                    yield outcome
                elif outcome.error is not None:
                    raise outcome.error
                else:
                    running -= 1
        finally:
            stopped.set()
            crew.join()


@dataclass(frozen=True, slots=True)
class _Ended:
    """A thread has ended, of an error or for want of tasks."""

    error: BaseException | None


def _keep_freed_memory() -> None:
    """Have glibc hand the memory of one slab to the next instead of back to the system, which costs more than computing.

    It keeps twice the size of the largest block that was freed; this one's pages are never touched.
    """
    torch.empty(_KEPT_BYTES, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class ProcessExecutor:
    """A pool of fresh processes that share the machine's cores.

    Attributes:
        workers: number of processes.
    """

    workers: int

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigurationError(f"workers is a positive number, not {self.workers}")

    def run(
        self, factory: Callable[[], Worker[TaskT, ResultT]], tasks: Iterable[TaskT]
    ) -> Generator[ResultT, None, None]:
        """See :class:`Executor`.

        ``factory``, tasks and results must pickle.

        Raises:
            ConversionError: a worker process died.
            ResourceError: the system starts no more processes.
        """
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        before = set(multiprocessing.active_children())
        with safe_spawning():
            pool = ProcessPoolExecutor(
                self.workers,
                # A forked child of a threaded torch can hang.
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(factory, threads),
            )
        finished = False
        try:
            with exhaustion("working in several processes"):
                yield from _results(pool, iter(tasks), ahead=2 * self.workers)
            finished = True
        except BrokenProcessPool as error:
            raise ConversionError(
                "a worker process died before it could say why",
                hint="it may have run out of memory: use fewer workers. A script that uses workers needs "
                "`if __name__ == '__main__':` around its own code",
            ) from error
        finally:
            if not finished:
                for process in set(multiprocessing.active_children()) - before:
                    process.terminate()
            with suppress(RuntimeError):  # it cannot join a thread of its own that never started
                pool.shutdown(wait=True, cancel_futures=True)


def _results(pool: ProcessPoolExecutor, tasks: Iterator[TaskT], ahead: int) -> Iterator[Any]:
    """Keep ``ahead`` tasks submitted, so that a huge plan is not pickled at once."""
    pending: set[Future[Any]] = set()
    exhausted = False
    while pending or not exhausted:
        while not exhausted and len(pending) < ahead:
            try:
                task = next(tasks)
                with safe_spawning():
                    pending.add(pool.submit(_run_task, task))
            except StopIteration:
                exhausted = True
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


_worker: Any = None


def _start_worker(factory: Callable[[], Worker[Any, Any]], threads: int) -> None:
    global _worker
    # The terminal sends Ctrl-C to the whole group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _worker = factory().__enter__()


def _run_task(task: Any) -> Any:
    return _worker(task)
