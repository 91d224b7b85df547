"""Computing one tensor: pieces of its rows in, writes to its places in the output out.

A method that works in slabs of rows gets and writes a slab at a time; one that
needs the whole weight gets it as one piece.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass

import torch

from qwodel.algorithms.data_aware import RoundingReport
from qwodel.algorithms.determinism import one_thread
from qwodel.algorithms.hadamard import Basis
from qwodel.algorithms.quant_types import TENSOR
from qwodel.algorithms.scales import absmax_scale, nearest_codes
from qwodel.checkpoint.files.dtypes import torch_dtype
from qwodel.checkpoint.files.slabs import row_slabs
from qwodel.checkpoint.formats.codec import Codec
from qwodel.checkpoint.rounding.methods import LayerCodes, LayerWeight
from qwodel.checkpoint.tensors import Action, TensorPlan
from qwodel.exceptions import ConversionError, ValidationError

__all__ = ["Measured", "Write", "compute_tensor", "in_slabs", "plan_slabs"]


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """Bytes for their place: ``data`` at byte ``at`` of output tensor ``tensor``."""

    tensor: str
    data: torch.Tensor | bytes
    at: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return len(self.data) if isinstance(self.data, bytes) else self.data.nbytes


@dataclass(frozen=True, slots=True)
class Measured:
    """What a rounding method knows of its codes.

    Attributes:
        squared_error: ‖W−Ŵ‖².
        report: how a data-aware method found them.
    """

    squared_error: float
    report: RoundingReport | None = None


def in_slabs(plan: TensorPlan) -> bool:
    """Whether the method takes a weight in slabs of rows instead of whole."""
    if plan.action is not Action.QUANTIZE or plan.rounding is None or plan.format is None:
        return True
    if plan.format.mixes_rows:
        return False
    return plan.rounding.rows_apart(plan.format.granularity)


def plan_slabs(plan: TensorPlan, elements: int) -> Iterator[tuple[int, int]]:
    """Yield row ranges in the order in which :func:`compute_tensor` wants them; slabs have about ``elements`` weights."""
    shape = plan.source.shape
    if not in_slabs(plan):
        yield 0, shape[0]
    elif plan.action is Action.QUANTIZE and plan.format:
        granularity = plan.format.granularity
        yield from row_slabs(shape, granularity.block_rows or 1, elements)
        if granularity == TENSOR and plan.rounding and plan.rounding.is_nearest:
            # A pass for the scale, one for the codes: a second read is cheaper than fresh memory.
            yield from row_slabs(shape, elements=elements)
    else:
        yield from row_slabs(shape, elements=elements)


def compute_tensor(
    plan: TensorPlan, pieces: Iterator[torch.Tensor], device: torch.device
) -> Generator[Write, None, Measured | None]:
    """Turn the tensor's pieces into writes, on ``device``; return what is known of codes that are not plainly the nearest."""
    for tensor in plan.outputs:
        if tensor.payload is not None:
            yield Write(tensor.name, tensor.payload)
    if plan.action is Action.COPY:
        yield from _in_place(plan.outputs[0].name, pieces)
    elif plan.action is Action.CAST and plan.format:
        yield from _in_place(plan.outputs[0].name, _cast(plan, plan.format, _on(device, pieces)))
    elif plan.action is Action.QUANTIZE and plan.format and plan.rounding and plan.rounding.is_nearest:
        yield from _nearest(plan, plan.format, _rotated(plan, _on(device, pieces)))
    elif plan.action is Action.QUANTIZE and plan.format and plan.rounding:
        # Sums in these methods depend on the number of threads, and results must not.
        with one_thread():
            return (yield from _round(plan, plan.format, _rotated(plan, _on(device, pieces))))
    else:
        raise ConversionError(f"nothing says how to {plan.action} it")
    return None


def _on(device: torch.device, pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    for piece in pieces:
        yield piece.to(device, non_blocking=True)


def _rotated(plan: TensorPlan, pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Pieces in the basis in which they are rounded."""
    basis = _basis(plan)
    for piece in pieces:
        yield piece if basis is None else basis.apply(piece.float())


def _basis(plan: TensorPlan) -> Basis | None:
    return plan.format.basis(plan.source.shape) if plan.format else None


def _in_place(target: str, pieces: Iterator[torch.Tensor]) -> Iterator[Write]:
    """Writes of ``pieces`` one after another."""
    place = 0
    for piece in pieces:
        yield Write(target, piece, place)
        place += piece.nbytes


def _cast(plan: TensorPlan, wanted: Codec, pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    dtype = torch_dtype(wanted.cast_to or plan.outputs[0].dtype)
    for rows in pieces:
        cast = rows.to(dtype)
        if not bool(cast.isfinite().all()) and bool((cast.isinf() & rows.isfinite()).any()):
            raise ValidationError(
                f"values up to {float(rows.abs().max()):.3g} do not fit {wanted.cast_to}",
                hint="keep this tensor as it is with exclude_layers",
            )
        yield cast


def _nearest(plan: TensorPlan, wanted: Codec, pieces: Iterator[torch.Tensor]) -> Iterator[Write]:
    assert wanted.quant_type is not None
    places = _Places(plan)
    shared = None
    if wanted.granularity == TENSOR:
        shared = _tensor_scale(wanted, pieces, plan.source.shape[0])
    scales = []
    for rows in pieces:
        part = absmax_scale(rows, wanted.quant_type, wanted.granularity) if shared is None else shared
        scales.append(part)
        yield from places.codes(nearest_codes(rows, part, wanted.quant_type, wanted.granularity))
    yield from places.scales(shared if shared is not None else torch.cat(scales))


def _tensor_scale(wanted: Codec, pieces: Iterator[torch.Tensor], count: int) -> torch.Tensor:
    """The whole tensor's absmax scale, from the pieces of its first ``count`` rows."""
    assert wanted.quant_type is not None
    scales = []
    while count > 0:
        rows = next(pieces)
        count -= rows.shape[0]
        scale = absmax_scale(rows, wanted.quant_type, TENSOR)
        # A slab of zeros has the scale 1, which says nothing about the rest.
        if float(scale) != 1.0 or bool(rows.any()):
            scales.append(scale)
    return torch.stack(scales).amax() if scales else torch.ones((), dtype=torch.float32)


def _round(
    plan: TensorPlan, wanted: Codec, pieces: Iterator[torch.Tensor]
) -> Generator[Write, None, Measured]:
    places = _Places(plan)
    scales, error, report = [], 0.0, None
    for rows in pieces:
        rounded = _round_rows(plan, wanted, rows)
        done, report = rounded.codes, rounded.report
        error += float((rows.float() - done.dequantize()).double().square().sum())
        scales.append(done.scale)
        yield from places.codes(done.codes)
    yield from places.scales(scales[0] if len(scales) == 1 else torch.cat(scales))
    return Measured(error, report)


class _Places:
    """Where the parts of one weight go: codes of rows one after another, scales at the end."""

    def __init__(self, plan: TensorPlan) -> None:
        if plan.storage is None:
            raise ConversionError("nothing says how its codes are stored")
        self._codec, self._dialect = plan.storage.codec, plan.storage.dialect
        self._names = {tensor.local: tensor.name for tensor in plan.outputs}
        self._filled = dict.fromkeys(self._names, 0)

    def codes(self, codes: torch.Tensor) -> Iterator[Write]:
        return self._writes(self._codec.encode_codes(codes, self._dialect))

    def scales(self, scale: torch.Tensor) -> Iterator[Write]:
        return self._writes(self._codec.encode_scales(scale, self._dialect))

    def _writes(self, parts: Mapping[str, torch.Tensor]) -> Iterator[Write]:
        for local, data in parts.items():
            yield Write(self._names[local], data, self._filled[local])
            self._filled[local] += data.nbytes


def _round_rows(plan: TensorPlan, wanted: Codec, rows: torch.Tensor) -> LayerCodes:
    assert wanted.quant_type is not None
    assert plan.rounding is not None
    layer = plan.name.removesuffix(".weight")
    given = LayerWeight(layer, rows, wanted.quant_type, wanted.granularity, _basis(plan))
    rounded = plan.rounding.round(given)
    done = rounded.codes
    if done.quant_type != wanted.quant_type or done.granularity != wanted.granularity:
        raise ConversionError(
            f"{plan.rounding.name} returned {done.quant_type} with {done.granularity} scales"
        )
    return rounded
