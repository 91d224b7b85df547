"""Carrying out one tensor's plan: read, merge, round, write, slab by slab where the method allows.

The three stages are apart, so that an executor may run them in three threads:
what is read follows from the plan alone, computing consumes pieces in that
order and yields writes, and writes may be carried out later.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from qwodel.algorithms.quant_types import TENSOR
from qwodel.algorithms.scales import Quantized, absmax_scale, quantize
from qwodel.checkpoint.decisions import Action
from qwodel.checkpoint.dtypes import torch_dtype
from qwodel.checkpoint.layout import OutputTensor, Role
from qwodel.checkpoint.plan import TensorPlan
from qwodel.checkpoint.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.rounding import Nearest
from qwodel.checkpoint.slabs import row_slabs
from qwodel.checkpoint.storage_format import StorageFormat
from qwodel.checkpoint.writer import FilePlan, PlannedWriter
from qwodel.exceptions import ConversionError, QuantizationError, ResourceError, ValidationError

__all__ = ["TensorResult", "TensorWorker", "WorkerFactory", "Write", "weight_rows"]

_COPY_BYTES = 8 << 20
_KEEP_ELEMENTS = 64 << 20  # a weight up to this size is read once, not once for each pass
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What became of one tensor.

    Attributes:
        name: the tensor.
        source_bytes: bytes of the source it stands for, for progress.
        squared_error: ‖W−Ŵ‖² of codes chosen otherwise than to the nearest; ``None`` elsewhere.
        fell_back: it was worked on again on the CPU, as the device's memory ran out.
    """

    name: str
    source_bytes: int
    squared_error: float | None = None
    fell_back: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """Bytes for their place: ``data`` at byte ``at`` of output tensor ``tensor``."""

    tensor: str
    data: torch.Tensor | bytes
    at: int = 0

    @property
    def nbytes(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else self.data.nbytes


@dataclass(frozen=True, slots=True)
class WorkerFactory:
    """Opens a :class:`TensorWorker`; travels to worker processes."""

    source: Path
    files: tuple[FilePlan, ...]
    paths: Mapping[str, Path]

    def __call__(self) -> TensorWorker:
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
        work = self.compute(plan, self.read(plan), _CPU)
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
        rounding, wanted = plan.rounding, plan.format
        if plan.action is not Action.QUANTIZE or rounding is None or wanted is None:
            return {}
        if isinstance(rounding, Nearest) or rounding.rows_apart(wanted.granularity):
            return {}
        return {"hadamard": math.prod(plan.source.shape)}

    def read(self, plan: TensorPlan) -> Iterator[torch.Tensor]:
        """Yield what :meth:`compute` will want of the source, in that order, in memory of its own."""
        with _naming(plan):
            if plan.action is Action.COPY:
                yield from self._stored_bytes(plan.source.stored[0])
            else:
                # A merge's sums depend on the number of threads, and results must not.
                with _threads(1 if plan.loras else None):
                    for start, stop in _slabs(plan):
                        yield weight_rows(self._reader, plan, start, stop)

    def compute(
        self, plan: TensorPlan, pieces: Iterator[torch.Tensor], device: torch.device
    ) -> Generator[Write, None, TensorResult]:
        """Turn ``pieces`` into writes on ``device``.

        Raises:
            torch.OutOfMemoryError: the device's memory ran out; nothing that was yielded is wrong.
        """
        error: float | None = None
        with _naming(plan):
            for tensor in plan.outputs:
                if tensor.payload is not None:
                    yield Write(tensor.name, tensor.payload)
            if plan.action is Action.COPY:
                yield from _in_place(plan.outputs[0].name, pieces)
            elif plan.action is Action.CAST and plan.format:
                yield from _in_place(plan.outputs[0].name, _cast(plan, plan.format, pieces, device))
            elif plan.action is Action.QUANTIZE and plan.format and isinstance(plan.rounding, Nearest):
                yield from _nearest(plan, plan.format, _on(device, pieces))
            elif plan.action is Action.QUANTIZE and plan.format and plan.rounding:
                # Sums in these methods depend on the number of threads, and results must not.
                with _threads(1):
                    error = yield from _round(plan, plan.format, _on(device, pieces))
            else:
                raise ConversionError(f"nothing says how to {plan.action} it")
        size = sum(self._reader.entry(part).nbytes for part in plan.source.stored)
        return TensorResult(plan.name, size, error)

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


def _slabs(plan: TensorPlan) -> Iterator[tuple[int, int]]:
    """Row ranges in the order the plan's method wants them."""
    shape, rounding = plan.source.shape, plan.rounding
    if plan.action is Action.CAST or plan.format is None or rounding is None:
        yield from row_slabs(shape)
        return
    granularity = plan.format.granularity
    if not isinstance(rounding, Nearest) and not rounding.rows_apart(granularity):
        yield 0, shape[0]
        return
    yield from row_slabs(shape, granularity.block_rows or 1)
    if granularity == TENSOR and not _kept(plan):
        yield from row_slabs(shape)


def _kept(plan: TensorPlan) -> bool:
    """Whether slabs are kept from the pass that finds a whole tensor's scale to the one that rounds."""
    return math.prod(plan.source.shape) <= _KEEP_ELEMENTS


def _on(device: torch.device, pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    for piece in pieces:
        yield piece.to(device, non_blocking=True)


def _in_place(target: str, pieces: Iterator[torch.Tensor]) -> Iterator[Write]:
    """Writes of ``pieces`` one after another."""
    place = 0
    for piece in pieces:
        yield Write(target, piece, place)
        place += piece.nbytes


def _cast(
    plan: TensorPlan, wanted: StorageFormat, pieces: Iterator[torch.Tensor], device: torch.device
) -> Iterator[torch.Tensor]:
    dtype = torch_dtype(wanted.cast_to or plan.outputs[0].dtype)
    for rows in _on(device, pieces):
        cast = rows.to(dtype)
        if not bool(cast.isfinite().all()) and bool((cast.isinf() & rows.isfinite()).any()):
            raise ValidationError(
                f"values up to {float(rows.abs().max()):.3g} do not fit {wanted.cast_to}",
                hint="keep this tensor as it is with exclude_layers",
            )
        yield cast


def _nearest(plan: TensorPlan, wanted: StorageFormat, pieces: Iterator[torch.Tensor]) -> Iterator[Write]:
    assert wanted.quant_type is not None
    codes, scale = _by_role(plan.outputs)
    shared = None
    if wanted.granularity == TENSOR:
        kept: list[torch.Tensor] | None = [] if _kept(plan) else None
        count = sum(1 for _ in row_slabs(plan.source.shape))
        shared = _tensor_scale(wanted, (next(pieces) for _ in range(count)), kept)
        pieces = pieces if kept is None else _popped(kept)
    scales, place = [], 0
    for rows in pieces:
        done = quantize(rows, wanted.quant_type, wanted.granularity, shared)
        scales.append(done.scale)
        yield Write(codes.name, done.codes, place)
        place += done.codes.nbytes
    yield Write(scale.name, shared if shared is not None else torch.cat(scales))


def _tensor_scale(
    wanted: StorageFormat, pieces: Iterator[torch.Tensor], kept: list[torch.Tensor] | None
) -> torch.Tensor:
    """The whole tensor's absmax scale; slabs also go into ``kept``."""
    assert wanted.quant_type is not None
    scales, device = [], _CPU
    for rows in pieces:
        device = rows.device
        if kept is not None:
            kept.append(rows)
        scale = absmax_scale(rows, wanted.quant_type, TENSOR)
        # A slab of zeros has the scale 1, which says nothing about the rest.
        if float(scale) != 1.0 or bool(rows.any()):
            scales.append(scale)
    return torch.stack(scales).amax() if scales else torch.ones((), device=device)


def _popped(kept: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Hand slabs on one by one, letting each go."""
    kept.reverse()
    while kept:
        yield kept.pop()


def _round(
    plan: TensorPlan, wanted: StorageFormat, pieces: Iterator[torch.Tensor]
) -> Generator[Write, None, float]:
    codes, scale = _by_role(plan.outputs)
    scales, place, error = [], 0, 0.0
    for rows in pieces:
        done = _round_rows(plan, wanted, rows)
        error += float((rows.float() - done.dequantize()).double().square().sum())
        scales.append(done.scale)
        yield Write(codes.name, done.codes, place)
        place += done.codes.nbytes
    yield Write(scale.name, scales[0] if len(scales) == 1 else torch.cat(scales))
    return error


def _round_rows(plan: TensorPlan, wanted: StorageFormat, rows: torch.Tensor) -> Quantized:
    assert wanted.quant_type is not None
    assert plan.rounding is not None
    done = plan.rounding.round(
        rows, wanted.quant_type, wanted.granularity, layer=plan.name.removesuffix(".weight")
    )
    if done.quant_type != wanted.quant_type or done.granularity != wanted.granularity:
        raise ConversionError(
            f"{plan.rounding.name} returned {done.quant_type} with {done.granularity} scales"
        )
    return done


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
        raise type(failure)(f"{plan.name}: {failure}", hint=failure.hint) from failure
    except (RuntimeError, MemoryError) as failure:
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


def _by_role(outputs: Sequence[OutputTensor]) -> tuple[OutputTensor, OutputTensor]:
    found = {tensor.role: tensor for tensor in outputs}
    return found[Role.CODES], found[Role.SCALE]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with ``count`` threads; ``None`` changes nothing."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
