"""Which constant of a program holds which parameter of the source.

Conversion renames, transposes and shares weights, but keeps their values rounded to float16. A sum
over all values that does not depend on their order therefore finds a parameter again, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from qwodel.exceptions import ConversionError

__all__ = ["Fingerprint", "SourceTensors", "fingerprint"]

Fingerprint = tuple[int, int, int]
_PIECE = 1 << 22


def fingerprint(values: np.ndarray) -> Fingerprint:
    """Return number, sum and sum of squares (mod 2⁶⁴) of the float16 bit patterns of ``values``."""
    flat = values.reshape(-1)
    total = squares = np.uint64(0)
    for start in range(0, flat.size, _PIECE):
        halves = flat[start : start + _PIECE].astype(np.float16)
        halves[halves == 0] = 0  # both zeros are one
        bits = halves.view(np.uint16).astype(np.uint64)
        with np.errstate(over="ignore"):
            total += bits.sum(dtype=np.uint64)
            squares += (bits * bits).sum(dtype=np.uint64)
    return int(flat.size), int(total), int(squares)


@dataclass(frozen=True)
class SourceTensors:
    """Fingerprints of a module's parameters and buffers → their names."""

    parameters: dict[Fingerprint, tuple[str, ...]]
    buffers: frozenset[Fingerprint]

    @classmethod
    def of(cls, module: torch.nn.Module, threshold: int, prefix: str = "") -> SourceTensors:
        """Look at all tensors of more than ``threshold`` elements; ``prefix`` is taken off their names.

        Raises:
            ConversionError: a weight does not fit float16.
        """
        found: dict[Fingerprint, tuple[str, ...]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if parameter.numel() > threshold and parameter.is_floating_point():
                _check_range(name.removeprefix(prefix), parameter)
                key = fingerprint(parameter.detach().float().numpy())
                found[key] = (*found.get(key, ()), name.removeprefix(prefix))
        buffers = frozenset(_buffer_prints(module.buffers(), threshold))
        return cls(found, buffers - found.keys())

    @property
    def names(self) -> list[str]:
        """All names of parameters."""
        return [name for names in self.parameters.values() for name in names]


def _buffer_prints(buffers: Iterable[torch.Tensor], threshold: int) -> Iterable[Fingerprint]:
    for buffer in buffers:
        if buffer.numel() > threshold and buffer.is_floating_point():
            yield fingerprint(buffer.detach().float().numpy())


def _check_range(name: str, parameter: torch.Tensor) -> None:
    low, high = parameter.detach().aminmax()
    if not max(abs(float(low)), abs(float(high))) <= float(np.finfo(np.float16).max):
        raise ConversionError(
            f"{name} has values that float16 cannot hold (from {float(low):.3g} to {float(high):.3g})",
            hint="Core ML stores weights in float16: rescale the layer, or check that the checkpoint is sound",
        )
