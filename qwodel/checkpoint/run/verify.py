"""Reading a conversion back: every tensor decoded from the file alone and compared with the source.

What the file says of itself (``.comfy_quant``, ``quantization_config``, dtypes
and shapes) decides how it is decoded, not the plan that wrote it.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from qwodel.checkpoint.files.dtypes import torch_dtype
from qwodel.checkpoint.files.headers import CheckpointHeaders
from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.files.slabs import row_slabs
from qwodel.checkpoint.plan.plan import Plan
from qwodel.checkpoint.run.convert import Conversion
from qwodel.checkpoint.run.executor import Executor, SerialExecutor
from qwodel.checkpoint.run.tensor_work import weight_rows
from qwodel.checkpoint.source.checkpoint import Checkpoint
from qwodel.checkpoint.tensors import Action, TensorPlan
from qwodel.exceptions import IntegrityError
from qwodel.progress import Progress
from qwodel.report import TensorQuality, decibels

__all__ = ["read_output", "verify"]

_COMPARE_BYTES = 8 << 20
_MEASURE_ELEMENTS = 1 << 17  # a slab's temporaries stay in a core's cache
_AGREEMENT_DB = 0.01
_SUBNORMAL = 1e-44  # fp32 has steps of 1.4e-45 there, however small the scale
_MERGE_SLACK = 1e-5
_SMALL = 1e-25  # below, squares may have vanished in fp32


@dataclass(frozen=True, slots=True)
class _Check:
    plan: TensorPlan
    squared_error: float | None


@dataclass(frozen=True, slots=True)
class _Checked:
    source_bytes: int
    quality: TensorQuality | None


def verify(
    conversion: Conversion,
    *,
    written: Checkpoint | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> tuple[TensorQuality, ...]:
    """Read a conversion back and measure every quantized layer; copies must be equal byte for byte.

    Args:
        written: the output as :func:`read_output` found it; it is looked through here if not given.

    Returns:
        The quality of every quantized layer, in the source's order.

    Raises:
        IntegrityError: a file, a tensor or a value differs from what should have been written.
        Cancelled: the progress callback raised.
    """
    progress = progress or Progress(None)
    plan = conversion.plan
    checks = [_Check(each, conversion.squared_errors.get(each.name)) for each in plan.tensors if each.outputs]
    progress.stage("verify", f"{len(checks)} tensors")
    written = written or read_output(plan, conversion.destination)
    done, total, measured = 0, plan.source_bytes, {}
    factory = _VerifierFactory(plan.checkpoint.headers, written)
    with closing((executor or SerialExecutor()).run(factory, checks)) as results:
        for result in results:
            done += result.source_bytes
            if result.quality:
                measured[result.quality.name] = result.quality
            progress.update(done, total, result.quality.name if result.quality else "")
    return tuple(measured[each.name] for each in plan.tensors if each.name in measured)


def read_output(plan: Plan, destination: Path) -> Checkpoint:
    """What the files of an output say, which must be the planned tensors, no others, with their dtypes and shapes.

    Raises:
        IntegrityError: they say something else, or hold other payloads or documents than planned.
    """
    planned = {
        tensor.name: (tensor.dtype, tensor.shape)
        for group in (*(each.outputs for each in plan.tensors), plan.constants)
        for tensor in group
    }
    headers = CheckpointHeaders.read(destination)
    with UnifiedSafetensorsLoader(headers, low_memory=True) as reader:
        found = {name: (entry.dtype, entry.shape) for name, entry in reader.entries.items()}
        for tensor in (
            tensor for each in plan.tensors for tensor in each.outputs if tensor.payload is not None
        ):
            if tensor.name in found and bytes(reader.read_bytes(tensor.name).numpy()) != tensor.payload:
                raise IntegrityError(f"{tensor.name!r} in {destination} is not what was written")
    differing = sorted(set(planned.items()) ^ set(found.items()))
    if differing:
        raise IntegrityError(f"{destination} differs from its plan in tensor {differing[0][0]!r}")
    for name, text in plan.documents.items():
        if (destination / name).read_bytes() != text:
            raise IntegrityError(f"{destination / name} is not what was written")
    return Checkpoint.alone(headers)


@dataclass(frozen=True, slots=True)
class _VerifierFactory:
    source: CheckpointHeaders
    written: Checkpoint

    def __call__(self) -> _Verifier:
        return _Verifier(self)


class _Verifier:
    """Compares one tensor at a time; source and output are open."""

    def __init__(self, factory: _VerifierFactory) -> None:
        self._source = UnifiedSafetensorsLoader(factory.source, low_memory=True)
        self._output = factory.written.open()
        self._decoded = {each.name: each for each in factory.written.sources.tensors}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()
        self._output.close()

    def __call__(self, check: _Check) -> _Checked:
        plan = check.plan
        quality = None
        if plan.action is Action.QUANTIZE:
            quality = self._measure(check)
        elif plan.action is Action.CAST:
            self._compare_cast(plan)
        else:
            self._compare_copy(plan)
        size = sum(self._source.entry(part).nbytes for part in plan.source.stored)
        return _Checked(size, quality)

    def _measure(self, check: _Check) -> TensorQuality:
        plan = check.plan
        decoded = self._decoded.get(plan.name)
        if decoded is None or decoded.decoder is None or decoded.decoder.scaled is None:
            raise IntegrityError(f"{plan.name!r} cannot be decoded from what was written")
        # Rotations keep lengths: the error is measured where the codes are, before it is turned back.
        basis, whole = decoded.decoder.basis(self._output), decoded.decoder.whole
        decoder = decoded.decoder.scaled
        multiple = decoder.block[0] if decoder.block[0] < plan.source.shape[0] else 1
        signal, noise, worst = 0.0, 0.0, 0.0
        nearest = plan.rounding is not None and plan.rounding.is_nearest
        factors = decoder.factors(self._output)
        slabs = row_slabs(plan.source.shape, multiple, _MEASURE_ELEMENTS)
        for start, stop in [(0, plan.source.shape[0])] if whole else slabs:
            weight = weight_rows(self._source, plan, start, stop).float()
            if basis is not None:
                weight = basis.apply(weight)
            codes = decoder.codes(self._output, start, stop)
            scale = decoder.spread(factors, start, stop, codes.shape)
            error = (codes * scale).sub_(weight)
            signal += _square_sum(weight)
            noise += _square_sum(error)
            turned = None if basis is None else basis.restore(error)
            peaks = error.abs_().amax(dim=1, keepdim=True)
            worst = max(worst, float(peaks.amax() if turned is None else turned.abs().amax()))
            if nearest:
                _check_bound(plan, codes, scale, error, peaks)
        if not math.isfinite(noise):
            raise IntegrityError(f"{plan.name!r} decodes to numbers that are not finite")
        sqnr = decibels(signal, noise)
        if not nearest:
            _check_reported(check, signal, sqnr)
        rounding = plan.rounding.name if plan.rounding else ""
        mse = noise / math.prod(plan.source.shape)
        return TensorQuality(plan.name, sqnr, mse, max_error=worst, format=plan.becomes, rounding=rounding)

    def _compare_cast(self, plan: TensorPlan) -> None:
        name = plan.outputs[0].name
        dtype = torch_dtype(plan.outputs[0].dtype)
        for start, stop in row_slabs(plan.source.shape):
            expected = weight_rows(self._source, plan, start, stop).to(dtype)
            shape = plan.source.shape
            found = (
                self._output.get_rows(name, start, stop)
                if shape
                else self._output.get_tensor(name).reshape(1)
            )
            if not torch.equal(_raw(found), _raw(expected)) and not plan.loras:
                raise IntegrityError(f"{name!r} differs from its source")
            if not torch.allclose(found.float(), expected.float(), rtol=1e-2, equal_nan=True):
                raise IntegrityError(f"{name!r} differs from its merged source")

    def _compare_copy(self, plan: TensorPlan) -> None:
        source, target = plan.source.stored[0], plan.outputs[0].name
        total = self._source.entry(source).nbytes
        for start in range(0, total, _COMPARE_BYTES):
            stop = min(start + _COMPARE_BYTES, total)
            if not torch.equal(
                self._source.read_bytes(source, start, stop), self._output.read_bytes(target, start, stop)
            ):
                raise IntegrityError(f"{target!r} differs from its source")


def _check_bound(
    plan: TensorPlan, codes: torch.Tensor, scale: torch.Tensor, sizes: torch.Tensor, peaks: torch.Tensor
) -> None:
    """No error of plain rounding exceeds half the distance between neighbouring codes.

    Args:
        codes: of a slab, in fp32; overwritten.
        scale: their scales, broadcastable to them.
        sizes: ``|W−Ŵ|``; overwritten.
        peaks: the largest of each row.
    """
    if plan.format is None or not plan.format.quantizes:
        return
    # A merge that was summed in another order adds more.
    allowed = plan.format.bound(codes, scale, _MERGE_SLACK if plan.loras else 0.0)
    # Where a row has one bound, its largest error speaks for all of them.
    excess = peaks - allowed if allowed.ndim == 0 or allowed.shape[1] == 1 else sizes.sub_(allowed)
    if not float(excess.amax()) <= _SUBNORMAL:  # NaN too
        raise IntegrityError(f"{plan.name!r} holds codes that are not the nearest to its weights")


def _check_reported(check: _Check, signal: float, sqnr: float) -> None:
    """The file decodes to the error that rounding reported."""
    name = check.plan.name
    if check.squared_error is None:
        raise IntegrityError(f"nobody reported how {name!r} was rounded")
    reported = decibels(signal, check.squared_error)
    if not math.isclose(sqnr, reported, abs_tol=_AGREEMENT_DB):
        raise IntegrityError(f"{name!r} decodes to {sqnr:.2f} dB, but was rounded to {reported:.2f} dB")


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _square_sum(x: torch.Tensor) -> float:
    """‖x‖² of a slab, in fp32 where its range is enough."""
    flat = x.reshape(-1)
    total = float(torch.dot(flat, flat))
    if _SMALL < total < math.inf:
        return total
    flat = flat.double()
    return float(torch.dot(flat, flat))
