"""Run a written ML program on the CPU.

Arithmetic is float32; every result is rounded to the type the program declares for it, so a float16
program loses here what it must lose, and what else a device loses depends on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch

from qwodel.backends.coreml.mil.program import MilOperation, Program, TensorType
from qwodel.backends.coreml.mil.registry import NO_EFFECT, OPERATIONS
from qwodel.exceptions import ConversionError, IntegrityError

__all__ = ["Evaluator", "known_operations"]

for _family in ("elementwise", "shapes", "networks", "compression"):
    import_module(f"qwodel.backends.coreml.mil.{_family}")

_ROUNDED = {"FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}
_STATES = frozenset({"read_state", "write_state"})


class Evaluator:
    """A program with its constants in memory, ready to be run.

    Args:
        program: what was written.

    Raises:
        ConversionError: the program has operations that the evaluator does not know; they are named.
    """

    def __init__(self, program: Program) -> None:
        unknown = sorted({op.type for op in program.operations} - {*OPERATIONS, *_STATES})
        if unknown:
            raise ConversionError(
                f"the evaluator does not know {', '.join(unknown)}",
                hint="the written weights are checked all the same; run the model on a Mac to compare its outputs",
            )
        self._program = program
        self.overflows: dict[str, str] = {}
        """Operations whose finite results did not fit the declared type so far: name → MIL type."""
        self._constants: dict[str, Any] = {}
        for name in program.constants:
            self._constants[name] = _tensor(program.constant(name))
        self._fold_weights()

    def states(self) -> dict[str, torch.Tensor]:
        """Return fresh states, all zero; :meth:`run` changes them in place."""
        named = {
            op.inputs["input"]
            for op in self._program.operations
            if op.type in _STATES and "input" in op.inputs
        }
        return {
            name: torch.zeros([size or 1 for size in self._program.inputs[name].shape])
            for name in sorted(named)
        }

    @torch.no_grad()
    def run(
        self, inputs: Mapping[str, Any], states: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Evaluate the program.

        Args:
            inputs: arrays or tensors by input name; images as pixel values ``[1, 3, H, W]``.
            states: from :meth:`states`, for a program that has them.

        Returns:
            Outputs by name; float16 ones come as float32 holding float16 values.

        Raises:
            IntegrityError: an operation fails, or gives another shape than the program declares.
        """
        values: dict[str, Any] = {**self._constants}
        for name, kind in self._program.inputs.items():
            values[name] = (
                name if states is not None and name in states else _round(_tensor(inputs[name]), kind)
            )
        last_use = self._last_uses
        for position, operation in enumerate(self._operations):
            self._step(operation, values, states)
            for name in last_use.get(position, ()):
                values.pop(name, None)
        return {name: values[name] for name in self._program.outputs}

    def _fold_weights(self) -> None:
        """Decompress weights once; they do not depend on inputs."""
        self._operations = [op for op in self._program.operations if not op.type.startswith("constexpr_")]
        for operation in self._program.operations:
            if operation.type.startswith("constexpr_"):
                self._step(operation, self._constants, None)
        used = {name for op in self._operations for name in _read(op)}
        self._constants = {name: value for name, value in self._constants.items() if name in used}
        last: dict[str, int] = {}
        for position, operation in enumerate(self._operations):
            last |= dict.fromkeys(_read(operation), position)
        kept = {*self._program.outputs, *self._constants}
        self._last_uses: dict[int, list[str]] = {}
        for name, position in last.items():
            if name not in kept:
                self._last_uses.setdefault(position, []).append(name)

    def _step(
        self, operation: MilOperation, values: dict[str, Any], states: dict[str, torch.Tensor] | None
    ) -> None:
        arguments = {
            key: _value(self._program.resolve(given, values))
            for key, given in operation.inputs.items()
            if key not in NO_EFFECT
        }
        try:
            if operation.type in _STATES:
                result = _state(operation, arguments, states)
            else:
                result = OPERATIONS[operation.type](**arguments)
        except Exception as error:
            raise IntegrityError(
                f"the operation {operation.type} ({operation.name}) of the written program fails: {error}"
            ) from error
        results = result if isinstance(result, list) else [result]
        for (name, kind), each in zip(operation.outputs.items(), results, strict=False):
            _check_shape(operation, kind, each)
            values[name] = rounded = _round(each, kind)
            if rounded is not each and not torch.isfinite(rounded).all() and torch.isfinite(each).all():
                self.overflows[operation.name] = operation.type


def _state(
    operation: MilOperation, arguments: Mapping[str, Any], states: dict[str, torch.Tensor] | None
) -> torch.Tensor | list[torch.Tensor]:
    name = operation.inputs["input"]
    if states is None:
        raise ValueError(f"the program has the state {name!r}, and none was given")
    if operation.type == "read_state":
        return states[name]
    states[name] = arguments["data"]
    return []


def _read(operation: MilOperation) -> list[str]:
    flat = [
        each
        for given in operation.inputs.values()
        for each in (given if isinstance(given, list) else [given])
    ]
    return [each for each in flat if isinstance(each, str)]


def _tensor(value: Any) -> Any:
    """Arrays → tensors, floating ones in float32; text and lists of text stay."""
    if isinstance(value, np.ndarray):
        wide = np.int32 if value.dtype in (np.uint16, np.int16, np.uint32) else value.dtype
        value = torch.from_numpy(np.array(value, wide))  # a copy: mapped files are read-only
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.float()
    return value


def _value(given: Any) -> Any:
    return [_tensor(each) for each in given] if isinstance(given, list) else _tensor(given)


def _round(value: torch.Tensor, kind: TensorType) -> torch.Tensor:
    if kind.dtype in _ROUNDED and value.is_floating_point():
        return value.to(_ROUNDED[kind.dtype]).float()
    return value


def _check_shape(operation: MilOperation, kind: TensorType, value: torch.Tensor) -> None:
    declared = kind.shape
    fits = len(declared) == value.ndim and all(
        size is None or size == actual for size, actual in zip(declared, value.shape, strict=True)
    )
    if not fits:
        raise IntegrityError(
            f"{operation.type} ({operation.name}) gives shape {list(value.shape)}, and the program declares {list(declared)}"
        )


def known_operations() -> frozenset[str]:
    """Return the MIL operations that can be evaluated."""
    return frozenset(OPERATIONS)
