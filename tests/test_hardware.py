"""The table with its edges, the measured batch and the backoff, on simulated devices."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from qwodel.exceptions import ResourceError
from qwodel.hardware import (
    GPU,
    CalibrationSizes,
    auto_sizes,
    available_memory,
    headroom,
    is_out_of_memory,
    refine_batch,
    with_backoff,
)

GiB = 1 << 30


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (-1.0, (1, 2048, 32)),
        (0.0, (1, 2048, 32)),
        (4 - 2**-30, (1, 2048, 32)),
        (4, (2, 4096, 64)),
        (8 - 2**-30, (2, 4096, 64)),
        (8, (4, 4096, 128)),
        (16 - 2**-30, (4, 4096, 128)),
        (16, (8, 8192, 128)),
        (24, (8, 8192, 128)),
        (24 + 2**-30, (16, 8192, 256)),
        (1000, (16, 8192, 256)),
    ],
)
def test_every_row_and_edge_of_the_table(free: float, expected: tuple[int, int, int]) -> None:
    assert auto_sizes(int(free * GiB)) == CalibrationSizes(*expected)


def test_headroom_is_what_the_tightest_gpu_has_beside_the_model() -> None:
    one = [GPU("a", 24 * GiB, 20 * GiB)]
    two = [*one, GPU("b", 24 * GiB, 9 * GiB)]
    assert headroom(3 * GiB, one, 100 * GiB) == 17 * GiB
    assert headroom(3 * GiB, two, 100 * GiB) == 6 * GiB
    assert headroom(3 * GiB, [], 10 * GiB) == 7 * GiB
    assert headroom(30 * GiB, one) == -10 * GiB


def test_a_measured_pass_lowers_the_batch_and_never_raises_it() -> None:
    sizes = CalibrationSizes(16, 2048, 64)

    def line(fixed: int, each: int) -> object:
        return lambda batch: fixed + each * batch

    # 100 + 10 n ≤ 0.8 · 300 holds up to n = 14.
    assert refine_batch(sizes, line(100, 10), 300).batch_size == 14  # type: ignore[arg-type]
    assert refine_batch(sizes, line(0, 1), 10**6) == sizes  # type: ignore[arg-type]
    assert refine_batch(sizes, line(10**6, 5), 100).batch_size == 1  # type: ignore[arg-type]

    def exhausted(batch: int) -> int:
        raise OutOfMemoryError("CUDA out of memory")

    assert refine_batch(sizes, exhausted, 300).batch_size == 1
    with pytest.raises(ZeroDivisionError):
        refine_batch(sizes, lambda batch: 1 // 0, 300)


class _Device:
    """A device where batch × sequence length, and the samples kept, take memory."""

    def __init__(self, tokens: int, samples: int = 10**9) -> None:
        self.tokens, self.samples = tokens, samples
        self.seen: list[CalibrationSizes] = []

    def run(self, sizes: CalibrationSizes) -> str:
        self.seen.append(sizes)
        if sizes.batch_size * sizes.seq_length > self.tokens or sizes.num_samples > self.samples:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return "done"


def test_what_fits_at_once_is_not_retried() -> None:
    fitted = with_backoff(_Device(10**9).run, CalibrationSizes(16, 8192, 256))
    assert (fitted.value, fitted.sizes, fitted.steps) == ("done", CalibrationSizes(16, 8192, 256), ())


def test_backoff_halves_batch_then_sequence_then_samples(caplog: pytest.LogCaptureFixture) -> None:
    device = _Device(tokens=600, samples=50)
    with caplog.at_level(logging.WARNING, "qwodel.hardware"):
        fitted = with_backoff(device.run, CalibrationSizes(4, 2048, 100))
    assert [(each.batch_size, each.seq_length, each.num_samples) for each in device.seen] == [
        (4, 2048, 100), (2, 2048, 100), (1, 2048, 100), (1, 1024, 100), (1, 512, 100), (1, 512, 50),
    ]  # fmt: skip
    assert fitted.sizes == device.seen[-1]
    assert [step.next for step in fitted.steps] == device.seen[1:]
    assert fitted.steps[0].as_dict() == {
        "failed": "batch_size 4, seq_length 2048, num_samples 100",
        "next": "batch_size 2, seq_length 2048, num_samples 100",
        "reason": "CUDA out of memory. Tried to allocate 2.00 GiB",
    }
    assert caplog.text.count("out of memory with") == 5


def test_backoff_ends_with_what_would_have_fitted() -> None:
    def estimate(sizes: CalibrationSizes) -> int:
        return sizes.batch_size * sizes.seq_length << 20

    device = _Device(tokens=200)
    with pytest.raises(ResourceError, match="smallest sizes tried: CUDA out of memory") as caught:
        with_backoff(device.run, CalibrationSizes(2, 2048, 64), estimate=estimate, free=200 << 20)
    assert len(device.seen) == 6
    assert device.seen[-1] == CalibrationSizes(1, 512, 16)
    assert "batch_size 1, seq_length 128, num_samples 16 would have fitted" in str(caught.value.hint)
    with pytest.raises(ResourceError) as hopeless:
        with_backoff(_Device(0).run, CalibrationSizes(1, 64, 4), estimate=estimate, free=1)
    assert "no sizes fit" in str(hopeless.value.hint)


def test_a_retry_starts_after_the_failed_attempts_objects_are_gone() -> None:
    import weakref

    class Model:
        pass

    alive: list[weakref.ref[Model]] = []

    def attempt(sizes: CalibrationSizes) -> None:
        assert not any(reference() for reference in alive), "the failed attempt's model is still held"
        model = Model()
        alive.append(weakref.ref(model))
        if sizes.batch_size > 1:
            raise OutOfMemoryError("out of memory")

    with_backoff(attempt, CalibrationSizes(4, 256, 8))
    assert len(alive) == 3


def test_other_errors_are_not_taken_for_memory() -> None:
    def attempt(sizes: CalibrationSizes) -> None:
        raise ValueError("shapes differ")

    with pytest.raises(ValueError, match="shapes differ"):
        with_backoff(attempt, CalibrationSizes(4, 256, 8))
    assert is_out_of_memory(MemoryError())
    chained = RuntimeError("calibration failed")
    chained.__cause__ = OutOfMemoryError("x")
    assert is_out_of_memory(chained)
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("in-memory set"))


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other allocators give memory back their own way"
)
def test_memory_that_small_objects_took_is_given_back() -> None:
    """In a process of its own: 100 MB of objects below one that stays, and so pins the heap's end."""
    program = """
from qwodel.hardware import return_free_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
many = [bytearray(3000) for _ in range(40_000)]
last = bytearray(3000)
del many
held = resident()
return_free_memory()
print(held - resident())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 80_000_000


def test_free_memory_is_less_than_there_is_and_more_than_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off Linux too, where there is neither /proc nor a cgroup."""
    monkeypatch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    assert 0 < available_memory() < psutil.virtual_memory().total
