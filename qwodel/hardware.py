"""What this machine has, and the calibration sizes that fit it; asked without loading a framework.

The sizes follow from the *headroom*: the memory that is free, less the model's weights in the dtype
it computes in. Each process calibrates on one GPU, so of several GPUs the one with the least free
memory decides. Without a GPU the free main memory takes its place.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import psutil

from qwodel.exceptions import ResourceError
from qwodel.exhaustion import is_out_of_memory

__all__ = [
    "GPU",
    "VRAM_TABLE",
    "BackoffStep",
    "CalibrationSizes",
    "Fitted",
    "auto_sizes",
    "available_memory",
    "cpu_count",
    "headroom",
    "is_out_of_memory",
    "list_gpus",
    "refine_batch",
    "return_free_memory",
    "with_backoff",
]

GiB = 1 << 30
_log = logging.getLogger("qwodel.hardware")


@dataclass(frozen=True, slots=True)
class GPU:
    """One CUDA device: name, total and free memory in bytes."""

    name: str
    total: int
    free: int


def list_gpus() -> list[GPU]:
    """Return the CUDA devices ``nvidia-smi`` reports; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(
            query, capture_output=True, text=True, timeout=20, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = []
    for line in lines:
        name, total, free = (part.strip() for part in line.rsplit(",", 2))
        if total.isdigit() and free.isdigit():
            gpus.append(GPU(name, int(total) << 20, int(free) << 20))
    return gpus


def available_memory() -> int:
    """Return the bytes of main memory a process can still take (cgroup limits are respected on Linux)."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text("ascii"))
        return available if limit == "max" else max(min(available, int(limit) - used), 0)
    except (OSError, ValueError):
        return available


def return_free_memory() -> None:
    """Give memory that was freed, but is kept for later by the C library's allocator, back to the system.

    Worth it once, where a phase of many small objects ends; pages come back at a price.
    """
    with suppress(OSError, AttributeError):  # glibc's own
        ctypes.CDLL(None).malloc_trim(0)


def cpu_count() -> int:
    """Return the number of CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class CalibrationSizes:
    """How much a calibration takes at once, and in all."""

    batch_size: int
    seq_length: int
    num_samples: int

    def __str__(self) -> str:
        return f"batch_size {self.batch_size}, seq_length {self.seq_length}, num_samples {self.num_samples}"


class _Row(NamedTuple):
    below: float
    """The row's upper bound in GiB of headroom."""
    closed: bool
    """Whether a headroom of exactly ``below`` still belongs to the row."""
    sizes: CalibrationSizes


VRAM_TABLE: tuple[_Row, ...] = (
    _Row(4, False, CalibrationSizes(1, 2048, 32)),
    _Row(8, False, CalibrationSizes(2, 4096, 64)),
    _Row(16, False, CalibrationSizes(4, 4096, 128)),
    _Row(24, True, CalibrationSizes(8, 8192, 128)),
    _Row(float("inf"), True, CalibrationSizes(16, 8192, 256)),
)
"""Sizes by headroom: below 4 GiB, from 4, from 8, from 16 up to and with 24, above 24.

An edge belongs to the row above it; 24 does not, because the last row starts *above* 24.
"""

_MIN_SEQ_LENGTH = 64
_MIN_SAMPLES = 4
_MAX_CUTS = 2  # of sequence length, and of samples: beyond, calibration is worth too little
_SHARE = 0.8  # of the free memory a measured batch may take


def headroom(model_bytes: int, gpus: Sequence[GPU] | None = None, main_memory: int | None = None) -> int:
    """Return the bytes left beside the model; negative where it does not fit at all.

    Args:
        model_bytes: the weights in the dtype the model computes in.
        gpus: the GPUs to calibrate on; what ``nvidia-smi`` reports where ``None``, none where empty.
        main_memory: free bytes without a GPU; measured where ``None``.
    """
    devices = list_gpus() if gpus is None else gpus
    if devices:
        return min(gpu.free for gpu in devices) - model_bytes
    return (available_memory() if main_memory is None else main_memory) - model_bytes


def auto_sizes(headroom_bytes: int) -> CalibrationSizes:
    """Return the row of :data:`VRAM_TABLE` for this headroom."""
    for row in VRAM_TABLE:
        if headroom_bytes < row.below * GiB or (row.closed and headroom_bytes == row.below * GiB):
            return row.sizes
    raise AssertionError("the last row has no upper bound")


def refine_batch(sizes: CalibrationSizes, measure: Callable[[int], int], free: int) -> CalibrationSizes:
    """Return ``sizes`` with the largest batch, up to the present one, that measurements say will fit.

    ``measure(batch)`` runs a batch and returns its peak bytes beyond the weights. Two measurements
    give a line; 80 % of ``free`` bytes may be taken. A batch of one is returned where nothing fits,
    and where measuring itself runs out of memory.
    """
    if sizes.batch_size == 1:
        return sizes
    try:
        one, two = measure(1), measure(2)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return replace(sizes, batch_size=1)
    each = max(two - one, 1)
    fits = 1 + int((free * _SHARE - one) // each)
    batch = max(1, min(sizes.batch_size, fits))
    if batch < sizes.batch_size:
        _log.info("batch_size %d instead of %d, by a measured pass", batch, sizes.batch_size)
    return replace(sizes, batch_size=batch)


@dataclass(frozen=True, slots=True)
class BackoffStep:
    """One retry: the sizes that ran out of memory, and the next ones."""

    failed: CalibrationSizes
    next: CalibrationSizes
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return the step for a manifest."""
        return {"failed": str(self.failed), "next": str(self.next), "reason": self.reason}


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fitted(Generic[T]):
    """What an attempt returned, with which sizes, and after which retries."""

    value: T
    sizes: CalibrationSizes
    steps: tuple[BackoffStep, ...]


def with_backoff(
    attempt: Callable[[CalibrationSizes], T],
    sizes: CalibrationSizes,
    *,
    estimate: Callable[[CalibrationSizes], int] | None = None,
    free: int | None = None,
) -> Fitted[T]:
    """Call ``attempt`` until it does not run out of memory, with smaller sizes each time.

    The batch is halved down to one, then the sequence length twice, then the samples twice. An
    attempt must start from a clean state; whatever it holds must be reachable from its own frames
    only, which are gone before the next one starts.

    Args:
        attempt: does the work with the given sizes.
        sizes: what to start with.
        estimate: bytes some sizes would take, for the message when nothing fits.
        free: bytes there are, for the same.

    Raises:
        ResourceError: the smallest sizes ran out of memory too; it says what would have fitted.
    """
    steps: list[BackoffStep] = []
    smaller = _smaller(sizes)
    while True:
        try:
            return Fitted(attempt(sizes), sizes, tuple(steps))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            following = next(smaller, None)
            if following is None:
                raise ResourceError(
                    f"calibration ran out of memory with {sizes}, the smallest sizes tried: {reason}",
                    hint=_what_fits(sizes, estimate, free),
                ) from error
        # The exception's frames hold the attempt's tensors, and are gone only here.
        _log.warning("out of memory with %s; trying %s", sizes, following)
        steps.append(BackoffStep(sizes, following, reason))
        sizes = following


def _smaller(sizes: CalibrationSizes) -> Iterator[CalibrationSizes]:
    while sizes.batch_size > 1:
        sizes = replace(sizes, batch_size=sizes.batch_size // 2)
        yield sizes
    for _ in range(_MAX_CUTS):
        if sizes.seq_length // 2 >= _MIN_SEQ_LENGTH:
            sizes = replace(sizes, seq_length=sizes.seq_length // 2)
            yield sizes
    for _ in range(_MAX_CUTS):
        if sizes.num_samples // 2 >= _MIN_SAMPLES:
            sizes = replace(sizes, num_samples=sizes.num_samples // 2)
            yield sizes


def _what_fits(
    sizes: CalibrationSizes, estimate: Callable[[CalibrationSizes], int] | None, free: int | None
) -> str:
    advice = "free some memory, or use a device with more"
    if estimate is None or free is None:
        return advice
    candidate = sizes
    while estimate(candidate) > free:
        if candidate.seq_length > _MIN_SEQ_LENGTH:
            candidate = replace(candidate, seq_length=candidate.seq_length // 2)
        elif candidate.num_samples > _MIN_SAMPLES:
            candidate = replace(candidate, num_samples=candidate.num_samples // 2)
        else:
            return (
                f"by estimate {sizes} takes {estimate(sizes) / GiB:.2f} GiB and {free / GiB:.2f} GiB is free; "
                f"no sizes fit; {advice}"
            )
    return (
        f"by estimate {candidate} would have fitted ({estimate(candidate) / GiB:.2f} of {free / GiB:.2f} GiB)"
    )
