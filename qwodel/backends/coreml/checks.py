"""The written package against what was asked for and against its source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qwodel.backends.coreml.formats import CoreMLRecipe
from qwodel.backends.coreml.mil import compression  # noqa: F401 - registers the decoders
from qwodel.backends.coreml.mil.program import MilOperation, Program
from qwodel.backends.coreml.mil.registry import OPERATIONS
from qwodel.backends.coreml.weights import Weight
from qwodel.evaluation.quality import tensor_quality
from qwodel.exceptions import IntegrityError
from qwodel.report import TensorQuality

__all__ = ["WeightCheck", "check_interface", "check_size", "check_weights", "decode"]

_KINDS = {
    "linear": ("constexpr_blockwise_shift_scale", "constexpr_affine_dequantize"),
    "palette": ("constexpr_lut_to_dense",),
}
_SUFFIXES = ("_palettized", "_quantized")
_SIZE_TOLERANCE = 1.02
_SIZE_SLACK = 1 << 17  # small constants and 64-byte records


@dataclass(frozen=True, slots=True)
class WeightCheck:
    """A compressed weight as read back: its quality, operation, and groups that share a scale or palette."""

    quality: TensorQuality
    operation: str
    groups: int


def check_interface(
    program: Program, inputs: Mapping[str, str], outputs: Mapping[str, str | None], states: int, opset: str
) -> None:
    """Compare names and types of inputs and outputs, the number of states, and the operation set.

    Args:
        program: what was written.
        inputs: ``int32``, ``float32`` or ``image`` by name.
        outputs: ``float16`` or ``float32`` by name; ``None`` where any will do.
        states: how many.
        opset: such as ``CoreML8``, that of iOS 18.

    Raises:
        IntegrityError: they differ.
    """
    description = program.spec.description
    found = {each.name: _feature(each.type) for each in description.input}
    if found != dict(inputs):
        raise IntegrityError(f"the package has the inputs {found}, and {dict(inputs)} were asked for")
    given = {each.name: _feature(each.type) for each in description.output}
    fitting = all(kind in (None, given.get(name)) for name, kind in outputs.items())
    if list(given) != list(outputs) or list(program.outputs) != list(outputs) or not fitting:
        raise IntegrityError(f"the package has the outputs {given}, and {dict(outputs)} were asked for")
    if len(description.state) != states:
        raise IntegrityError(f"the package has {len(description.state)} states, and {states} were asked for")
    if program.opset != opset:
        raise IntegrityError(f"the package is written in {program.opset}, and {opset} was asked for")


def _feature(kind: Any) -> str:
    if kind.WhichOneof("Type") == "imageType":
        return "image"
    array = kind.multiArrayType
    name: str = array.ArrayDataType.Name(array.dataType)
    return name.lower()


def decode(program: Program, operation: MilOperation) -> torch.Tensor:
    """Return the dense weight of a ``constexpr`` operation, in float32."""
    arguments = {key: program.argument(operation, key) for key in operation.inputs}
    tensors = {
        key: torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
        for key, value in arguments.items()
    }
    dense: torch.Tensor = OPERATIONS[operation.type](**tensors)
    return dense.float()


def check_weights(
    original: Program, written: Program, weights: list[Weight], recipe: CoreMLRecipe, threshold: int
) -> list[WeightCheck]:
    """Decode every compressed weight and hold it against its float16 source.

    Each code must be the one nearest to its weight, every weight that is not listed as kept must be compressed
    in the asked manner, every kept one must be the same values, and no other constant of more than ``threshold``
    elements may be there.

    Raises:
        IntegrityError: one is not.
    """
    producers = {op.name: op for op in written.operations if op.type.startswith("constexpr_")}
    checks = []
    expected = {weight.name: weight for weight in weights}
    for weight in weights:
        values = original.constant(weight.name)
        if weight.kept is not None:
            if weight.name not in written.constants or not np.array_equal(
                written.constant(weight.name), values
            ):
                raise IntegrityError(
                    f"{weight.label} should have been left as it is ({weight.kept}), and differs"
                )
            continue
        operation = _compressed(original.operation_name(weight.name), producers)
        if operation is None or operation.type not in _KINDS[recipe.kind]:
            raise IntegrityError(
                f"{weight.label} should have been compressed to {recipe.describe()}, and is not"
            )
        checks.append(_check_weight(written, operation, weight, values, recipe))
    for name, kind in written.constants.items():
        large = kind.dtype in ("FLOAT16", "FLOAT32") and kind.numel > threshold
        if large and name not in expected and not _feeds_constexpr(name, producers):
            raise IntegrityError(f"the package has an uncompressed weight of unknown origin: {name}")
    return checks


def _compressed(name: str, producers: Mapping[str, MilOperation]) -> MilOperation | None:
    """Find the operation that coremltools' passes put in place of a constant."""
    return next((producers[name + suffix] for suffix in _SUFFIXES if name + suffix in producers), None)


def _feeds_constexpr(name: str, producers: Mapping[str, MilOperation]) -> bool:
    return any(name in operation.inputs.values() for operation in producers.values())


def _check_weight(
    written: Program, operation: MilOperation, weight: Weight, values: np.ndarray, recipe: CoreMLRecipe
) -> WeightCheck:
    dense = decode(written, operation)
    source = torch.from_numpy(np.array(values)).float()
    if dense.shape != source.shape:
        raise IntegrityError(
            f"{weight.label} has shape {list(dense.shape)}, and its source {list(source.shape)}"
        )
    error = (dense - source).abs()
    if recipe.kind == "linear":
        groups, limit = _step(written, operation, source)
        what = "a code is further from its weight than a step"
    else:
        groups, limit = _nearest(written, operation, source)
        what = "a code is not that of the palette's nearest entry"
    if bool((error > limit).any()):
        raise IntegrityError(f"{weight.label} was not stored as {recipe.describe()}: {what}")
    quality = tensor_quality(weight.label, source, dense)
    if quality.sqnr_db < recipe.sqnr_db:
        raise IntegrityError(
            f"{recipe.format} keeps only {quality.sqnr_db:.1f} dB of {weight.label}, and {recipe.sqnr_db:g} dB is the least that makes sense",
            hint="outliers share a scale or palette with small weights: pass a smaller group_size, "
            f"or exclude_layers=[{weight.label!r}]",
        )
    return WeightCheck(quality, operation.type, groups)


def _step(written: Program, operation: MilOperation, source: torch.Tensor) -> tuple[int, torch.Tensor]:
    """A step of the grid at each element: rounding to nearest costs half, a rounded zero point up to half more."""
    scale = torch.from_numpy(np.array(written.argument(operation, "scale"))).float()
    groups = scale.numel()
    axis = written.argument(operation, "axis")
    if axis is not None and scale.ndim:
        scale = scale.reshape([-1 if at == int(axis) else 1 for at in range(source.ndim)])
    if scale.ndim == source.ndim:
        for at, size in enumerate(source.shape):
            scale = scale.repeat_interleave(size // scale.shape[at], at)
    return groups, scale * 1.05 + source.abs() * 2**-10


def _nearest(written: Program, operation: MilOperation, source: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Distance of each element to the nearest entry of its palette, and a little for rounding."""
    palettes = torch.from_numpy(np.array(written.argument(operation, "lut"))).float()
    if palettes.ndim == 1:
        palettes = palettes.reshape([1] * source.ndim + [-1, 1])
    blocks = palettes.shape[: source.ndim]
    flat = palettes.reshape(-1, palettes.shape[-2])
    limit = torch.empty_like(source)
    axis = next((at for at, count in enumerate(blocks) if count > 1), 0)
    moved, target = source.movedim(axis, 0), limit.movedim(axis, 0)
    size = moved.shape[0] // len(flat)
    for group, palette in enumerate(flat):
        rows = slice(group * size, (group + 1) * size)
        ordered = palette.sort().values
        position = torch.searchsorted(ordered, moved[rows].contiguous()).clamp(1, len(ordered) - 1)
        near = torch.minimum(
            (moved[rows] - ordered[position - 1]).abs(), (ordered[position] - moved[rows]).abs()
        )
        target[rows] = near * (1 + 1e-5) + 1e-7
    return len(flat), limit


def check_size(
    written: Program, weights: list[Weight], checks: list[WeightCheck], recipe: CoreMLRecipe, threshold: int
) -> int:
    """Compare the bytes on disk with what the format should take, and return them.

    Raises:
        IntegrityError: the weights take more.
    """
    groups = {check.quality.name: check.groups for check in checks}
    per_group = (1 << recipe.bits) * 2 if recipe.kind == "palette" else 3
    nominal = 0.0
    for weight in weights:
        elements = math.prod(weight.shape)
        kind = written.constants.get(weight.name)
        kept = elements * (kind.bits if kind else 16) / 8
        nominal += kept if weight.kept else elements * recipe.bits / 8 + groups[weight.label] * per_group
    stored = sum(file.stat().st_size for file in written.package.rglob("*.bin"))
    small = sum(
        kind.numel * kind.bits / 8 for name, kind in written.constants.items() if kind.numel <= threshold
    )
    if stored > (nominal + small) * _SIZE_TOLERANCE + _SIZE_SLACK:
        raise IntegrityError(
            f"the weights take {stored:,} bytes, and {recipe.describe()} should take {nominal:,.0f}"
        )
    return stored
