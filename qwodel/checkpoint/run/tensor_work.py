"""Carrying out one tensor's plan: read and merge, compute, write, slab by slab where the method allows.

The three stages are apart, so that an executor may run them in three threads:
what is read follows from the plan alone, computing consumes pieces in that
order and yields writes, and writes may be carried out later.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from qwodel.algorithms.determinism import compute_threads
from qwodel.checkpoint.files.headers import CheckpointHeaders
from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.files.slabs import CACHED_ELEMENTS, SLAB_ELEMENTS
from qwodel.checkpoint.files.writer import FilePlan, PlannedWriter
from qwodel.checkpoint.run.tensor_compute import Measured, Write, compute_tensor, in_slabs, plan_slabs
from qwodel.checkpoint.tensors import Action, TensorPlan
from qwodel.exceptions import ConversionError, QuantizationError, ResourceError
from qwodel.exhaustion import exhausted

__all__ = ["TensorResult", "TensorWorker", "WorkerFactory", "weight_rows"]

_COPY_BYTES = 8 << 20
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What became of one tensor.

    Attributes:
        name: the tensor.
        source_bytes: bytes of the source it stands for, for progress.
        measured: of codes chosen otherwise than to the nearest; ``None`` elsewhere.
        fell_back: it was worked on again on the CPU, as the device's memory ran out.
    """

    name: str
    source_bytes: int
    measured: Measured | None = None
    fell_back: bool = False


@dataclass(frozen=True, slots=True)
class WorkerFactory:
    """Opens a :class:`TensorWorker`; travels to worker processes."""

    source: CheckpointHeaders
    files: tuple[FilePlan, ...]
    paths: Mapping[str, Path]

    def __call__(self) -> TensorWorker:
        """Open a worker, with files of its own."""
        return TensorWorker(self)


class TensorWorker:
    """Works on one tensor at a time with files of its own open.

    Reading, computing and writing may each have a thread of their own.
    """

    def __init__(self, factory: WorkerFactory) -> None:
        with ExitStack() as stack:
            self._reader = stack.enter_context(UnifiedSafetensorsLoader(factory.source, low_memory=True))
            self._writer = stack.enter_context(PlannedWriter(factory.files, factory.paths))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, plan: TensorPlan) -> TensorResult:
        """Carry out ``plan`` on the CPU.

        Raises:
            ValidationError: the weight holds NaN or Inf; the message names it.
            ConversionError: the method failed on this tensor.
            ResourceError: memory ran out.
        """
        work = self.compute(plan, self._read(plan, CACHED_ELEMENTS), _CPU)
        while True:
            try:
                self.write(next(work))
            except StopIteration as end:
                result: TensorResult = end.value
                return result
            except torch.OutOfMemoryError as failure:
                raise ResourceError(f"{plan.name}: {failure}") from failure

    def needs(self, plan: TensorPlan) -> Mapping[str, int]:
        """Return sizes that grow with the weight, by the names of streaming thresholds; none for slabs of rows."""
        return {} if in_slabs(plan) or plan.rounding is None else plan.rounding.needs(plan.source.shape)

    def read(self, plan: TensorPlan) -> Iterator[torch.Tensor]:
        """Yield what :meth:`compute` will want of the source, in that order, in memory of its own."""
        return self._read(plan, SLAB_ELEMENTS)

    def _read(self, plan: TensorPlan, elements: int) -> Iterator[torch.Tensor]:
        with _naming(plan):
            if plan.action is Action.COPY:
                yield from self._stored_bytes(plan.source.stored[0])
            else:
                # A merge's sums depend on the number of threads, and results must not.
                with compute_threads(1 if plan.loras else None):
                    for start, stop in plan_slabs(plan, elements):
                        yield weight_rows(self._reader, plan, start, stop)

    def compute(
        self, plan: TensorPlan, pieces: Iterator[torch.Tensor], device: torch.device
    ) -> Generator[Write, None, TensorResult]:
        """Turn ``pieces`` into writes on ``device``.

        Raises:
            torch.OutOfMemoryError: the device's memory ran out; nothing that was yielded is wrong.
        """
        with _naming(plan):
            measured = yield from compute_tensor(plan, pieces, device)
        size = sum(self._reader.entry(part).nbytes for part in plan.source.stored)
        return TensorResult(plan.name, size, measured)

    def write(self, item: Write) -> None:
        """Carry out one write; what lies on a device is fetched first."""
        data = item.data if isinstance(item.data, bytes) else item.data.cpu()
        self._writer.write(item.tensor, data, item.at)

    def fell_back(self, result: TensorResult) -> TensorResult:
        """Mark a result that took a second attempt, on the CPU."""
        return replace(result, fell_back=True)

    def _stored_bytes(self, name: str) -> Iterator[torch.Tensor]:
        total = self._reader.entry(name).nbytes
        for start in range(0, total, _COPY_BYTES):
            yield self._reader.read_bytes(name, start, min(start + _COPY_BYTES, total))


@contextmanager
def _naming(plan: TensorPlan) -> Iterator[None]:
    """Put the tensor's name before the message of whatever fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except QuantizationError as failure:
        if str(failure).startswith(plan.name):  # the stage before has said so
            raise
        raise failure.within(plan.name) from failure
    except (RuntimeError, MemoryError) as failure:
        if what := exhausted(failure):
            raise ResourceError(f"{plan.name}: {what}: {failure}") from failure
        raise ConversionError(f"{plan.name}: {type(failure).__name__}: {failure}") from failure


def weight_rows(reader: UnifiedSafetensorsLoader, plan: TensorPlan, start: int, stop: int) -> torch.Tensor:
    """Return rows of the weight as it is before rounding: decoded and with its LoRAs merged (then fp32)."""
    if not plan.source.shape:
        return reader.get_tensor(plan.source.stored[0]).reshape(1)
    rows = plan.source.row_decoder.rows(reader, start, stop)
    if plan.loras:
        rows = rows.float()
        for term in plan.loras:
            term.add_rows(rows, start, stop)
    return rows
