"""Reading, computing and writing at the same time.

One thread reads ahead, the calling thread computes, one thread writes behind.
The queues between them are bounded in bytes, so memory follows the largest piece
and not the checkpoint. Sums keep the order a serial run has, so on the CPU the
bytes are the same; on a device rounding to nearest gives them too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from qwodel.algorithms.determinism import compute_threads
from qwodel.checkpoint.run.byte_queue import ByteQueue
from qwodel.checkpoint.run.crew import Crew
from qwodel.checkpoint.run.executor import Worker
from qwodel.devices import StreamingOptions, device_memory
from qwodel.exceptions import ConversionError, ResourceError
from qwodel.exhaustion import exhaustion

__all__ = ["PipelineExecutor", "StagedWorker"]

log = logging.getLogger(__name__)

QUEUE_BYTES = 32 << 20
"""What may wait between two stages; a larger piece waits alone."""

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")
_CPU = torch.device("cpu")
_OUTGROWN = 0.75  # of its thresholds are left to a device that ran out of memory


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


@runtime_checkable
class StagedWorker(Protocol):
    """A worker whose tasks come apart into reading, computing and writing, each in a thread of its own."""

    def needs(self, plan: Any) -> Mapping[str, int]:
        """Sizes of a task by the names of streaming thresholds."""

    def read(self, plan: Any) -> Iterator[torch.Tensor]:
        """Yield the pieces of a task, on the CPU."""

    def compute(
        self, plan: Any, pieces: Iterator[torch.Tensor], device: torch.device
    ) -> Generator[Any, None, Any]:
        """Consume all pieces, yield what :meth:`write` takes, return the result."""

    def write(self, item: Any) -> None:
        """Carry out one write."""

    def fell_back(self, result: Any) -> Any:
        """Mark the result of a second attempt, on the CPU."""


@dataclass(frozen=True, slots=True)
class PipelineExecutor:
    """Three stages in three threads, for workers that are a :class:`StagedWorker`.

    Attributes:
        device: where tasks are computed that the streaming options leave there.
        streaming: which tasks go to the CPU, and what happens when memory runs out.
        free_memory: bytes that are free on a device; ``None`` where nobody can say.
    """

    device: torch.device
    streaming: StreamingOptions = field(default_factory=StreamingOptions)
    free_memory: Callable[[torch.device], int | None] = device_memory

    def run(
        self, factory: Callable[[], Worker[TaskT, ResultT]], tasks: Iterable[TaskT]
    ) -> Generator[ResultT, None, None]:
        """See :class:`~qwodel.checkpoint.run.executor.Executor`.

        Raises:
            ResourceError: the device's memory ran out where it may not, or the CPU's after it.
        """
        with factory() as worker:
            assert isinstance(worker, StagedWorker)
            # Sums depend on how many threads share a product.
            with compute_threads(1), closing(_Run(self, worker, list(tasks)).results()) as results:
                yield from results


class _Run:
    """The threads and queues of one run."""

    def __init__(self, executor: PipelineExecutor, worker: StagedWorker, tasks: Sequence[Any]) -> None:
        self.device, self.streaming = executor.device, executor.streaming
        self.thresholds = executor.streaming.thresholds_for(executor.free_memory(executor.device))
        self.worker, self.tasks = worker, tasks
        self.pieces: ByteQueue[torch.Tensor] = ByteQueue(QUEUE_BYTES)
        self.writes: ByteQueue[_Sized] = ByteQueue(QUEUE_BYTES)

    def results(self) -> Generator[Any, None, None]:
        crew = Crew()
        try:
            with exhaustion("starting threads"):
                crew.start("qwodel-read", self._read, self.pieces.end)
                crew.start("qwodel-write", self._write, self.writes.end)
            for task in self.tasks:
                yield self._compute(task)
            self.writes.finish()
            crew.join()
            self.writes.check()
        finally:
            self.pieces.stop()
            self.writes.stop()
            crew.join()

    def _read(self) -> None:
        with exhaustion("reading tensors"), compute_threads(1):
            for task in self.tasks:
                for piece in self.worker.read(task):
                    # A copy from pinned memory does not hold the computing thread up.
                    ready = piece.pin_memory() if self.device.type == "cuda" else piece
                    self.pieces.put(ready, ready.nbytes)
                self.pieces.put(None, 0)

    def _write(self) -> None:
        with exhaustion("writing tensors"), compute_threads(1):
            while (item := self.writes.get()) is not None:
                self.worker.write(item)

    def _compute(self, task: Any) -> Any:
        device = self._place(task)
        pieces = iter(self.pieces.get, None)
        try:
            return self._carry_out(task, pieces, device)
        except torch.OutOfMemoryError as error:
            if self.streaming.no_memory_limits:
                raise ResourceError(
                    f"{_name(task)}: {self.device} ran out of memory",
                    hint="drop no_memory_limits, and what does not fit is computed on the CPU",
                ) from error
            log.warning("%s does not fit into the memory of %s; the CPU takes it", _name(task), device)
        # Out here nothing of the failed attempt is alive.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.streaming.mode == "auto":
            self.thresholds = self.thresholds.scaled(_OUTGROWN)
        for _ in pieces:
            pass
        return self.worker.fell_back(self._again(task))

    def _again(self, task: Any) -> Any:
        try:
            return self._carry_out(task, self.worker.read(task), _CPU)
        except torch.OutOfMemoryError as error:
            raise ResourceError(f"{_name(task)}: memory ran out on {self.device}, then on the CPU") from error

    def _place(self, task: Any) -> torch.device:
        over = self.thresholds.exceeded(self.worker.needs(task))
        if over and self.device.type != "cpu":
            log.debug("%s is computed on the CPU: %s", _name(task), over)
        return _CPU if over else self.device

    def _carry_out(self, task: Any, pieces: Iterator[torch.Tensor], device: torch.device) -> Any:
        work = self.worker.compute(task, pieces, device)
        while True:
            try:
                item = next(work)
            except StopIteration as end:
                if next(pieces, None) is not None:
                    raise ConversionError(f"{_name(task)}: more was read than computed") from None
                return end.value
            self.writes.put(item, item.nbytes)


def _name(task: Any) -> str:
    return str(getattr(task, "name", task))
