"""A traceable module → a float16 ML program on disk, by coremltools."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from qwodel.backends.coreml.dimensions import Dimensions
from qwodel.backends.coreml.formats import output_type
from qwodel.backends.coreml.options import CoreMLOptions
from qwodel.backends.coreml.toolchain import (
    BarCallback,
    memory_errors,
    quiet_coremltools,
    record_log,
    report_bars,
)
from qwodel.backends.coreml.wrappers import PAST, TOKENS, Input, Traceable
from qwodel.exceptions import ConversionError, QuantizationError

__all__ = ["convert_program", "convert_traced", "trace"]

_LOCATED = re.compile(r"converting '(.+?)' op \(located at: '(.*?)'\)")


def examples(traceable: Traceable, dimensions: Dimensions) -> tuple[torch.Tensor, ...]:
    """Return inputs to trace with; a stateful model gets half of its tokens as past."""
    new = max(1, dimensions.traced // 2) if traceable.states else dimensions.traced
    sizes = {"batch": dimensions.batch, TOKENS: new, PAST: dimensions.traced}
    return tuple(_example(each, sizes) for each in traceable.inputs)


def _example(spec: Input, sizes: Mapping[str, int]) -> torch.Tensor:
    shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
    if spec.dtype == "int32":
        return torch.ones(shape, dtype=torch.int32)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 255


@torch.no_grad()
def trace(traceable: Traceable, dimensions: Dimensions) -> torch.jit.ScriptModule:
    """Trace the module.

    Raises:
        ConversionError: it cannot be traced; the submodule where it failed is named.
        ResourceError: memory ran out.
    """
    module = traceable.module
    try:
        with record_log(), memory_errors("the model was traced"):
            traced = torch.jit.trace(module, examples(traceable, dimensions), check_trace=False)  # type: ignore[no-untyped-call]
    except QuantizationError:
        raise
    except Exception as error:
        where = _failing_module(error, module)
        raise ConversionError(
            f"the model cannot be traced: {_first_line(error)} (in {where})",
            hint="the model's code needs something a trace has not, such as a branch on values; "
            "replace that module, or trace the model yourself and give the TorchScript file",
        ) from error
    for state in traceable.states:
        getattr(traced, state.name).zero_()
    return traced  # type: ignore[no-any-return]


def _failing_module(error: BaseException, root: torch.nn.Module) -> str:
    """Name the innermost submodule whose code was running when ``error`` was raised."""
    names = {id(module): name for name, module in root.named_modules()}
    found = "the model"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module) and names.get(id(owner)):
            found = f"{names[id(owner)].removeprefix('model.')}, a {type(owner).__name__}"
    return found


def convert_traced(
    traced: torch.jit.ScriptModule,
    traceable: Traceable,
    dimensions: Dimensions,
    target: str,
    options: CoreMLOptions,
    on_progress: BarCallback,
) -> Any:
    """Convert a trace and return coremltools' model, not yet saved under a name of ours.

    Raises:
        ConversionError: an operator cannot be converted; it, its module and what to try are named.
    """
    ct = quiet_coremltools()
    range_of = {
        TOKENS: ct.RangeDim(1, dimensions.longest, default=_default(TOKENS, dimensions, traceable)),
        PAST: ct.RangeDim(1, dimensions.longest, default=max(dimensions.traced, 1)),
    } if dimensions.longest and not dimensions.fixed and not dimensions.lengths else {}  # fmt: skip
    out_type = np.float16 if output_type(target) == "float16" else np.float32
    arguments: dict[str, Any] = {
        "inputs": [_input_type(ct, each, dimensions, range_of) for each in traceable.inputs],
        "outputs": [ct.TensorType(each.name, dtype=out_type) for each in traceable.outputs],
    }
    if traceable.states:
        arguments["states"] = [
            ct.StateType(ct.TensorType(shape=state.shape, dtype=np.float16), name=state.name)
            for state in traceable.states
        ]
    return _convert(ct, traced, traceable.module, arguments, target, options, on_progress)


def _default(kind: str, dimensions: Dimensions, traceable: Traceable) -> int:
    return (
        max(1, dimensions.traced // 2) if kind == TOKENS and traceable.states else max(dimensions.traced, 1)
    )


def convert_program(
    program: Any,
    names: list[str],
    target: str,
    options: CoreMLOptions,
    on_progress: BarCallback,
    examples: tuple[torch.Tensor, ...],
) -> Any:
    """Convert a TorchScript module or an exported program. Errors as for :func:`convert_traced`."""
    ct = quiet_coremltools()
    arguments: dict[str, Any] = {}
    if not isinstance(program, torch.export.ExportedProgram):
        arguments["inputs"] = [
            ct.TensorType(name, tuple(each.shape), dtype=_numpy_type(each))
            for name, each in zip(names, examples, strict=True)
        ]
    module = program if isinstance(program, torch.nn.Module) else None
    return _convert(ct, program, module, arguments, target, options, on_progress)


def _numpy_type(value: torch.Tensor) -> type[np.generic]:
    return np.float32 if value.is_floating_point() else np.int32


def _input_type(ct: Any, spec: Input, dimensions: Dimensions, range_of: Mapping[str, Any]) -> Any:
    if spec.dtype.startswith("image_"):
        layout = ct.colorlayout.RGB if spec.dtype == "image_rgb" else ct.colorlayout.GRAYSCALE
        return ct.ImageType(spec.name, shape=spec.shape, color_layout=layout)
    dtype = np.int32 if spec.dtype == "int32" else np.float32

    def shape(tokens: Any) -> tuple[Any, ...]:
        sizes = {"batch": dimensions.batch, TOKENS: tokens, PAST: tokens, **range_of}
        return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)

    if dimensions.lengths:
        shapes = [shape(length) for length in dimensions.lengths]
        return ct.TensorType(spec.name, ct.EnumeratedShapes(shapes, default=shapes[-1]), dtype=dtype)
    return ct.TensorType(spec.name, shape(dimensions.longest), dtype=dtype)


def _convert(
    ct: Any,
    program: Any,
    module: torch.nn.Module | None,
    arguments: Mapping[str, Any],
    target: str,
    options: CoreMLOptions,
    on_progress: BarCallback,
) -> Any:
    precision: Any = ct.precision.FLOAT16
    if options.float32_ops:
        kept = frozenset(options.float32_ops)
        precision = ct.transform.FP16ComputePrecision(op_selector=lambda op: op.op_type not in kept)
    with record_log() as log, report_bars(on_progress):
        try:
            with memory_errors("the model was converted"):
                return ct.convert(
                    program,
                    convert_to="mlprogram",
                    minimum_deployment_target=getattr(ct.target, target),
                    compute_precision=precision,
                    compute_units=getattr(ct.ComputeUnit, options.compute_units),
                    skip_model_load=True,
                    **arguments,
                )
        except QuantizationError:
            raise
        except Exception as error:
            raise _explained(error, log, module) from error


def _explained(error: Exception, log: list[str], module: torch.nn.Module | None) -> ConversionError:
    located = next((found for line in reversed(log) if (found := _LOCATED.search(line))), None)
    if located is None:
        return ConversionError(
            f"coremltools cannot convert the model: {_first_line(error)}",
            hint="try a later deployment_target, or trace the model yourself and give the TorchScript file",
        )
    owner = _owner(module, located[2].split("/"))
    where = f"in {owner}" if owner else f"at {located[2]}"
    return ConversionError(
        f"coremltools cannot convert the operator {located[1]} ({where}): {_first_line(error)}",
        hint="replace that module by one of plain tensor operations, register a conversion with "
        "coremltools.converters.mil.register_torch_op, or try a later deployment_target",
    )


def _owner(module: torch.nn.Module | None, path: list[str]) -> str:
    """Name the module that coremltools' location lies in: it leaves out lists, and ends with a value's name."""
    modules = dict(module.named_modules()) if module is not None else {}
    for length in range(len(path), 0, -1):
        fitting = [name for name in modules if _is_within(path[:length], name.split("."))]
        if fitting:
            name = min(fitting, key=len)
            # A loaded TorchScript module remembers its class's name.
            kind = getattr(modules[name], "original_name", type(modules[name]).__name__)
            return f"{name.removeprefix('model.')}, a {kind}"
    return ""


def _is_within(parts: list[str], name: list[str]) -> bool:
    """Whether ``name`` has all parts in this order and ends with the last."""
    rest = iter(name)
    return name[-1] == parts[-1] and all(part in rest for part in parts)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
