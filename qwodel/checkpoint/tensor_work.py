"""Carrying out one tensor's plan: read, merge, round, write, slab by slab where the method allows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from qwodel.checkpoint.rounding import Nearest, Rounding
from qwodel.checkpoint.slabs import row_slabs
from qwodel.checkpoint.storage_format import StorageFormat
from qwodel.checkpoint.writer import FilePlan, PlannedWriter
from qwodel.exceptions import ConversionError, QuantizationError, ValidationError

__all__ = ["TensorResult", "TensorWorker", "WorkerFactory", "weight_rows"]

_COPY_BYTES = 8 << 20
_KEEP_ELEMENTS = 64 << 20  # a weight up to this size is read once, not once for each pass


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What became of one tensor.

    Attributes:
        name: the tensor.
        source_bytes: bytes of the source it stands for, for progress.
        squared_error: ‖W−Ŵ‖² of codes chosen otherwise than to the nearest; ``None`` elsewhere.
    """

    name: str
    source_bytes: int
    squared_error: float | None = None


@dataclass(frozen=True, slots=True)
class WorkerFactory:
    """Opens a :class:`TensorWorker`; travels to worker processes."""

    source: Path
    files: tuple[FilePlan, ...]
    paths: Mapping[str, Path]

    def __call__(self) -> TensorWorker:
        return TensorWorker(self)


class TensorWorker:
    """Works on one tensor at a time with files of its own open."""

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
        """Carry out ``plan``.

        Raises:
            ValidationError: the weight holds NaN or Inf; the message names it.
            ConversionError: the method failed on this tensor.
        """
        error: float | None = None
        try:
            for tensor in plan.outputs:
                if tensor.payload is not None:
                    self._writer.write(tensor.name, tensor.payload)
            if plan.action is Action.COPY:
                self._copy(plan.source.stored[0], plan.outputs[0].name)
            elif plan.action is Action.CAST and plan.format:
                self._cast(plan, plan.format)
            elif plan.action is Action.QUANTIZE and plan.format and plan.rounding:
                error = self._quantize(plan, plan.format, plan.rounding)
            else:
                raise ConversionError(f"nothing says how to {plan.action} it")
        except QuantizationError as failure:
            raise type(failure)(f"{plan.name}: {failure}", hint=failure.hint) from failure
        except (RuntimeError, MemoryError) as failure:
            raise ConversionError(f"{plan.name}: {type(failure).__name__}: {failure}") from failure
        size = sum(self._reader.entry(part).nbytes for part in plan.source.stored)
        return TensorResult(plan.name, size, error)

    def _copy(self, source: str, target: str) -> None:
        total = self._reader.entry(source).nbytes
        for start in range(0, total, _COPY_BYTES):
            stop = min(start + _COPY_BYTES, total)
            self._writer.write(target, self._reader.read_bytes(source, start, stop), start)

    def _cast(self, plan: TensorPlan, wanted: StorageFormat) -> None:
        target = plan.outputs[0]
        dtype = torch_dtype(wanted.cast_to or target.dtype)
        place = 0
        for start, stop in row_slabs(plan.source.shape):
            rows = weight_rows(self._reader, plan, start, stop)
            cast = rows.to(dtype)
            if not bool(cast.isfinite().all()) and bool((cast.isinf() & rows.isfinite()).any()):
                raise ValidationError(
                    f"values up to {float(rows.abs().max()):.3g} do not fit {wanted.cast_to}",
                    hint="keep this tensor as it is with exclude_layers",
                )
            place += self._writer.write(target.name, cast, place)

    def _quantize(self, plan: TensorPlan, wanted: StorageFormat, rounding: Rounding) -> float | None:
        codes, scale = _by_role(plan.outputs)
        if isinstance(rounding, Nearest):
            with _threads(1 if plan.loras else None):
                self._nearest(plan, wanted, codes, scale)
            return None
        # Sums in these methods depend on the number of threads, and results must not.
        with _threads(1):
            return self._round(plan, wanted, rounding, codes, scale)

    def _nearest(
        self, plan: TensorPlan, wanted: StorageFormat, codes: OutputTensor, scale: OutputTensor
    ) -> None:
        assert wanted.quant_type is not None
        granularity = wanted.granularity
        kept: dict[int, torch.Tensor] = {}
        shared = self._tensor_scale(plan, wanted, kept) if granularity == TENSOR else None
        scales, place = [], 0
        for start, stop in row_slabs(plan.source.shape, granularity.block_rows or 1):
            rows = kept.pop(start) if start in kept else weight_rows(self._reader, plan, start, stop)
            done = quantize(rows, wanted.quant_type, granularity, shared)
            scales.append(done.scale)
            place += self._writer.write(codes.name, done.codes, place)
        self._writer.write(scale.name, shared if shared is not None else torch.cat(scales))

    def _tensor_scale(
        self, plan: TensorPlan, wanted: StorageFormat, kept: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        """The whole tensor's absmax scale; slabs of a weight that fits go into ``kept`` for the second pass."""
        assert wanted.quant_type is not None
        scales = []
        for start, stop in row_slabs(plan.source.shape):
            rows = weight_rows(self._reader, plan, start, stop)
            if math.prod(plan.source.shape) <= _KEEP_ELEMENTS:
                kept[start] = rows
            scale = absmax_scale(rows, wanted.quant_type, TENSOR)
            # A slab of zeros has the scale 1, which says nothing about the rest.
            if float(scale) != 1.0 or bool(rows.any()):
                scales.append(scale)
        return torch.stack(scales).amax() if scales else torch.ones(())

    def _round(
        self,
        plan: TensorPlan,
        wanted: StorageFormat,
        rounding: Rounding,
        codes: OutputTensor,
        scale: OutputTensor,
    ) -> float:
        granularity = wanted.granularity
        apart = rounding.rows_apart(granularity)
        slabs = (
            row_slabs(plan.source.shape, granularity.block_rows or 1)
            if apart
            else [(0, plan.source.shape[0])]
        )
        scales, place, error = [], 0, 0.0
        for start, stop in slabs:
            rows = weight_rows(self._reader, plan, start, stop)
            done = self._round_rows(plan, wanted, rounding, rows)
            error += float((rows.float() - done.dequantize()).double().square().sum())
            scales.append(done.scale)
            place += self._writer.write(codes.name, done.codes, place)
        self._writer.write(scale.name, torch.cat(scales) if apart else scales[0])
        return error

    def _round_rows(
        self, plan: TensorPlan, wanted: StorageFormat, rounding: Rounding, rows: torch.Tensor
    ) -> Quantized:
        assert wanted.quant_type is not None
        done = rounding.round(
            rows, wanted.quant_type, wanted.granularity, layer=plan.name.removesuffix(".weight")
        )
        if done.quant_type != wanted.quant_type or done.granularity != wanted.granularity:
            raise ConversionError(
                f"{rounding.name} returned {done.quant_type} with {done.granularity} scales"
            )
        return done


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
