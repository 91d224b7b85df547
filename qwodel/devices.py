"""Where a weight is worked on: the device asked for, or the CPU when it is too large for it.

A mode is a set of thresholds. A method that needs a whole weight, or matrices
that grow with it, says how large they are; above a threshold the CPU does the
work. Methods that go through slabs of rows need nothing that grows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType

import torch

from qwodel.exceptions import ConfigurationError, did_you_mean

__all__ = ["STREAMING_MODES", "StreamingOptions", "StreamingThresholds", "device_memory", "resolve_device"]

_WEIGHT_BYTES = 32  # a weight's fp32 copies in a method's hands: itself, scaled, codes, errors, gradients
_HESSIAN_BYTES = 24  # three fp64 matrices: the Gram matrix, its damped copy, its factor


@dataclass(frozen=True, slots=True)
class StreamingThresholds:
    """The largest sizes that stay on the device; ``None`` is no limit.

    Attributes:
        hadamard: elements of a weight that is worked on, or transformed, whole.
        hessian: columns of a Gram matrix.
        ldlq: columns of a weight that is rounded column by column under one.
        ortho: columns of a dense orthogonal matrix.
    """

    hadamard: int | None = None
    hessian: int | None = None
    ldlq: int | None = None
    ortho: int | None = None

    def exceeded(self, needs: Mapping[str, int]) -> str:
        """Say which of ``needs`` is above its threshold; empty when none is."""
        for name, size in needs.items():
            limit: int | None = getattr(self, name)
            if limit is not None and size > limit:
                return f"{name} {size:,} is above {limit:,}"
        return ""

    def scaled(self, factor: float) -> StreamingThresholds:
        """All thresholds times ``factor``."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return StreamingThresholds(
            **{name: None if value is None else int(value * factor) for name, value in values.items()}
        )

    @classmethod
    def for_memory(cls, free: int) -> StreamingThresholds:
        """What ``free`` bytes of a device's memory hold."""
        columns = math.isqrt(free // _HESSIAN_BYTES)
        return cls(free // _WEIGHT_BYTES, columns, columns, columns)


STREAMING_MODES: Mapping[str, StreamingThresholds | None] = MappingProxyType(
    {
        "off": StreamingThresholds(),
        "minimal": StreamingThresholds(150_000_000, 32768, 65536, 16384),
        "balanced": StreamingThresholds(100_000_000, 24576, 49152, 12288),
        "aggressive": StreamingThresholds(25_000_000, 8192, 16384, 4096),
        "auto": None,
    }
)
"""Mode → thresholds; ``auto`` goes by the device's free memory."""


@dataclass(frozen=True, slots=True)
class StreamingOptions:
    """How weights are shared out between a device and the CPU. The CPU alone has nothing to share out.

    Attributes:
        mode: a name in ``STREAMING_MODES``; ``auto`` also lowers its thresholds by a quarter
            whenever the device runs out of memory.
        overrides: single thresholds by name, in place of the mode's.
        no_memory_limits: no thresholds, and an out-of-memory is an error instead of the CPU's turn.
    """

    mode: str = "auto"
    overrides: Mapping[str, int | None] = field(default_factory=dict)
    no_memory_limits: bool = False

    def __post_init__(self) -> None:
        if self.mode not in STREAMING_MODES:
            raise ConfigurationError(
                f"there is no streaming mode {self.mode!r}",
                hint=did_you_mean(self.mode, STREAMING_MODES) or f"modes: {', '.join(STREAMING_MODES)}",
            )
        known = [each.name for each in fields(StreamingThresholds)]
        for name, value in self.overrides.items():
            if name not in known:
                raise ConfigurationError(
                    f"there is no streaming threshold {name!r}",
                    hint=did_you_mean(name, known) or f"thresholds: {', '.join(known)}",
                )
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ConfigurationError(f"streaming threshold {name} is a size or None, not {value!r}")
        if self.no_memory_limits and self.overrides:
            raise ConfigurationError(
                "no_memory_limits lifts every threshold, so streaming_thresholds would have no effect",
                hint="give one of the two",
            )

    def thresholds_for(self, free: int | None) -> StreamingThresholds:
        """Return the thresholds of a device with ``free`` bytes (``None``: unknown, or main memory)."""
        if self.no_memory_limits:
            return StreamingThresholds()
        base = STREAMING_MODES[self.mode]
        if base is None:
            base = StreamingThresholds() if free is None else StreamingThresholds.for_memory(free)
        return replace(base, **self.overrides)


def device_memory(device: torch.device) -> int | None:
    """Return the free bytes of a CUDA device; ``None`` for the CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def resolve_device(name: str) -> torch.device:
    """Return the device called ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"``: CUDA where there is one.

    Raises:
        ConfigurationError: no such device is known or present.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise ConfigurationError(
            f"there is no device {name!r}", hint="devices: auto, cpu, cuda, or cuda:N for the N-th GPU"
        )
    if kind == "cuda" and not torch.cuda.is_available():
        why = "no CUDA device is visible" if torch.version.cuda else "this PyTorch is built without CUDA"
        raise ConfigurationError(f"device {name!r} is not there: {why}", hint="device='cpu' works everywhere")
    if index and int(index) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"device {name!r} is not there: GPUs are numbered 0 to {torch.cuda.device_count() - 1}"
        )
    return torch.device(name)
