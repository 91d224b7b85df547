"""What this machine has: memory, disk and GPUs, asked without loading a framework."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["GPU", "available_memory", "cpu_count", "list_gpus"]


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
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        available = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text("ascii"))
        return available if limit == "max" else max(min(available, int(limit) - used), 0)
    except (OSError, ValueError):
        return available


def cpu_count() -> int:
    """Return the number of CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
