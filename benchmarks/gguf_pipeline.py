"""qwodel against the same two steps by hand: llama.cpp's converter, then ``llama_model_quantize``.

Each path runs in fresh processes and in a directory of its own, in turns (ours, by
hand, by hand, ours …), so that a busy machine hurts both alike. A thread samples the
resident memory of the whole process tree and the bytes in the directory. Both paths
must give the same bytes.

Usage: ``python benchmarks/gguf_pipeline.py [MODEL_DIR] [-f Q4_K_M] [-n 3]``
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from qwodel.backends.gguf.formats import file_type
from qwodel.backends.gguf.steps import intermediate_type
from qwodel.backends.gguf.toolchain import converter
from qwodel.cache import cache_dir
from qwodel.demo import demo_model
from qwodel.source import inspect_source

_QUANTIZE = """
import ctypes, sys
from llama_cpp import llama_cpp as lib
params = lib.llama_model_quantize_default_params()
params.ftype = int(sys.argv[3])
sys.exit(lib.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""
_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Run:
    """One run of one path: wall and CPU seconds, peak bytes in memory and on disk, digest of its output."""

    seconds: float
    cpu: float
    memory: int
    anonymous: int
    disk: int
    digest: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="?", type=Path, help="a Hugging Face model directory; default: the demo"
    )
    parser.add_argument("-f", "--format", default="Q4_K_M")
    parser.add_argument("-n", "--repeat", type=int, default=3, help="runs of each path")
    arguments = parser.parse_args()
    model = (arguments.model or demo_model(cache_dir(), print)).resolve()
    converter()  # laid before the clock starts

    ours: list[Run] = []
    by_hand: list[Run] = []
    paths: list[tuple[list[Run], Callable[[Path, str, Path], Path]]] = [(ours, _ours), (by_hand, _by_hand)]
    for turn in range(arguments.repeat):
        for runs, path in paths if turn % 2 == 0 else reversed(paths):
            runs.append(_measure(path, model, arguments.format))
    digests = {run.digest for run in (*ours, *by_hand)}
    assert len(digests) == 1, f"the outputs differ: {digests}"
    _print_table(model.name, arguments.format, ours, by_hand)


def _ours(model: Path, format_name: str, folder: Path) -> Path:
    _run("-m", "qwodel.cli.main", "quantize", model, "-b", "gguf", "-f", format_name, "-o", folder, "--quiet")
    return folder / f"{model.name}-{format_name}.gguf"


def _by_hand(model: Path, format_name: str, folder: Path) -> Path:
    intermediate, target = folder / "intermediate.gguf", folder / "quantized.gguf"
    outtype = intermediate_type(inspect_source(model))
    _run(converter().script, model, "--outfile", intermediate, "--outtype", outtype)
    _run("-c", _QUANTIZE, intermediate, target, file_type(format_name).number)
    intermediate.unlink()
    return target


def _run(*arguments: object) -> None:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{command[:3]} failed:\n{done.stderr[-2000:]}")


def _measure(path: Callable[[Path, str, Path], Path], model: Path, format_name: str) -> Run:
    with tempfile.TemporaryDirectory(prefix="qwodel-bench-") as text:
        folder = Path(text)
        os.sync()
        with _Sampler(folder) as sampler:
            started, busy = time.perf_counter(), _children_cpu()
            output = path(model, format_name, folder)
            seconds, cpu = time.perf_counter() - started, _children_cpu() - busy
        digest = hashlib.sha256(output.read_bytes()).hexdigest()
    return Run(seconds, cpu, sampler.memory, sampler.anonymous, sampler.disk, digest)


def _children_cpu() -> float:
    """Return the CPU seconds of all descendants that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class _Sampler(threading.Thread):
    """Samples what this process's descendants hold in memory, and what lies in ``folder``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.memory = self.anonymous = self.disk = 0
        self._stop_asked = threading.Event()

    def __enter__(self) -> _Sampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked.set()
        self.join()

    def run(self) -> None:
        this = psutil.Process()
        while not self._stop_asked.wait(_SAMPLE_SECONDS):
            resident = anonymous = 0
            for process in this.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    memory = process.memory_info()
                    resident += memory.rss
                    anonymous += memory.rss - memory.shared
            self.memory = max(self.memory, resident)
            self.anonymous = max(self.anonymous, anonymous)
            self.disk = max(self.disk, _bytes_under(self.folder))


def _bytes_under(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += Path(parent, name).stat().st_blocks * 512
    return total


def _print_table(model: str, format_name: str, ours: list[Run], by_hand: list[Run]) -> None:
    pairs = [mine.seconds / theirs.seconds for mine, theirs in zip(ours, by_hand, strict=True)]
    print(f"{model} → {format_name}, {len(ours)} runs of each path in turns; outputs are byte-identical\n")
    print(f"{'':<28}{'qwodel':>10}{'by hand':>10}{'ratio':>8}")
    rows: list[tuple[str, str, float, float]] = [
        ("wall, best (s)", ".2f", min(r.seconds for r in ours), min(r.seconds for r in by_hand)),
        ("CPU, best (s)", ".2f", min(r.cpu for r in ours), min(r.cpu for r in by_hand)),
        ("peak memory (MB)", ".0f", max(r.memory for r in ours) / 1e6, max(r.memory for r in by_hand) / 1e6),
        (
            "  of it not file-backed (MB)",
            ".0f",
            max(r.anonymous for r in ours) / 1e6,
            max(r.anonymous for r in by_hand) / 1e6,
        ),
        ("peak disk (MB)", ".0f", max(r.disk for r in ours) / 1e6, max(r.disk for r in by_hand) / 1e6),
    ]
    for label, form, mine, theirs in rows:
        print(f"{label:<28}{mine:>10{form}}{theirs:>10{form}}{mine / theirs:>8.2f}")
    print(f"{'wall, paired runs':<28}{'median':>20}{statistics.median(pairs):>8.2f}")
    print(f"{'':<28}{'least':>20}{min(pairs):>8.2f}")


if __name__ == "__main__":
    main()
