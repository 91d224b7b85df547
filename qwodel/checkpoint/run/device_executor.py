"""The executor that suits a device: stages for a GPU; on the CPU a tensor for each core, or processes.

On the CPU stages are left to weights which are worked on whole: those in slabs
take so little memory that each core has one of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from qwodel.checkpoint.run.executor import Executor, ProcessExecutor, ThreadExecutor, Worker
from qwodel.checkpoint.run.pipeline import PipelineExecutor, StagedWorker
from qwodel.devices import StreamingOptions
from qwodel.hardware import cpu_count

__all__ = ["CoresExecutor", "executor_for", "make_executor"]

log = logging.getLogger(__name__)

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")
_CPU = torch.device("cpu")
_THREADS = 4  # more would wait for the disk


@dataclass(frozen=True, slots=True)
class CoresExecutor:
    """A few threads of this process; what a :class:`StagedWorker` needs whole goes through stages afterwards.

    Attributes:
        threads: how many tasks are worked on at a time.
    """

    threads: int = field(default_factory=lambda: min(cpu_count(), _THREADS))

    def run(
        self, factory: Callable[[], Worker[TaskT, ResultT]], tasks: Iterable[TaskT]
    ) -> Generator[ResultT, None, None]:
        """See :class:`~qwodel.checkpoint.run.executor.Executor`.

        Raises:
            ResourceError: the memory ran out.
        """
        in_slabs: list[TaskT] = []
        whole: list[TaskT] = []
        with factory() as worker:
            staged = worker if isinstance(worker, StagedWorker) else None
            for task in tasks:
                (whole if staged is not None and staged.needs(task) else in_slabs).append(task)
        for executor, share in ((ThreadExecutor(self.threads), in_slabs), (PipelineExecutor(_CPU), whole)):
            if share:
                with closing(executor.run(factory, share)) as results:
                    yield from results


def executor_for(
    device: torch.device, workers: int = 1, streaming: StreamingOptions | None = None
) -> Executor:
    """Return the executor of a conversion: a pipeline for a device, threads or ``workers`` processes on the CPU.

    Raises:
        ConfigurationError: ``workers`` is below 1.
    """
    if device.type == "cpu":
        log.debug("everything is computed on the CPU, so streaming modes have nothing to move")
        return CoresExecutor() if workers == 1 else ProcessExecutor(workers)
    return PipelineExecutor(device, streaming or StreamingOptions())


def make_executor(workers: int = 1) -> Executor:
    """Return an executor on the CPU: ``workers`` processes, or with 1 some threads of this one.

    Raises:
        ConfigurationError: ``workers`` is below 1.
    """
    return executor_for(_CPU, workers)
