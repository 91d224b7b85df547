"""Wall time and peak memory of streaming conversion against plain load-and-save of the same shards.

Each measurement runs in a process of its own; memory is the peak resident set
above what imports take. One table at the end::

    python benchmarks/checkpoint_streaming.py            # 0.5 and 2 GB
    python benchmarks/checkpoint_streaming.py --sizes 0.5 2 6
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, WIDE = 4096, 11008
SHARD = 1_000_000_000


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write a sharded bf16 checkpoint shaped like a language model; return its largest tensor's bytes."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "mlp.up_proj": (WIDE, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDE),
    }
    shard: dict[str, torch.Tensor] = {}
    written, layer, weight_map, shards = 0, 0, {}, []
    while written < gigabytes * 1e9:
        for name, shape in shapes.items():
            weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            shard[f"model.layers.{layer}.{name}.weight"] = weight
            written += weight.numel() * 2
        layer += 1
        if (
            sum(t.numel() * 2 for t in shard.values()) > min(SHARD, gigabytes * 5e8)
            or written >= gigabytes * 1e9
        ):
            name = f"part-{len(shards):05d}.safetensors"
            save_file(shard, folder / name, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, name)
            shards.append(name)
            shard = {}
    document = {"metadata": {"total_size": written}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    return HIDDEN * WIDE * 2


def resident_mb(field: str = "VmRSS") -> float:
    """Resident memory now, or its peak (``VmHWM``, which unlike getrusage's starts anew with the program)."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(field)) / 1024


def load_and_save(source: Path, target: Path) -> float:
    """Load every shard whole and save it again, one after another."""
    from safetensors.torch import load_file, save_file

    base = resident_mb()
    for shard in sorted(source.glob("*.safetensors")):
        save_file(load_file(shard), target / shard.name)
    return base


def stream(source: Path, target: Path, name: str, check: bool, workers: int) -> float:
    from qwodel.checkpoint.convert import convert
    from qwodel.checkpoint.executor import make_executor
    from qwodel.checkpoint.plan import build_plan
    from qwodel.checkpoint.recipe import Recipe
    from qwodel.checkpoint.storage_format import storage_format
    from qwodel.checkpoint.transformers_layout import TransformersLayout
    from qwodel.checkpoint.verify import verify

    base = resident_mb()
    plan = build_plan(source, Recipe(format=storage_format(name), max_shard_size=SHARD), TransformersLayout())
    executor = make_executor(workers)
    conversion = convert(plan, target, executor=executor)
    if check:
        verify(conversion, executor=executor)
    return base


def measure_here(arguments: argparse.Namespace) -> None:
    """One measurement, in this process; prints JSON."""
    import torch  # noqa: F401 - imports are not what is measured

    source, target = Path(arguments.source), Path(arguments.target)
    started = time.perf_counter()
    if arguments.measure == "load-and-save":
        base = load_and_save(source, target)
    else:
        name, _, check = arguments.measure.partition("+")
        base = stream(source, target, name, bool(check), arguments.workers)
    seconds = time.perf_counter() - started
    peak = resident_mb("VmHWM")
    print(json.dumps({"seconds": seconds, "base": base, "peak": peak}))


def measure(what: str, source: Path, scratch: Path, workers: int) -> dict[str, float]:
    target = scratch / "out"
    target.mkdir()
    os.sync()
    command = [sys.executable, __file__, "--measure", what, "--source", str(source), "--target", str(target)]
    done = subprocess.run([*command, "--workers", str(workers)], check=True, capture_output=True, text=True)
    shutil.rmtree(target)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.5, 2.0], help="gigabytes")
    parser.add_argument(
        "--formats", nargs="+", default=["fp8_e4m3", "int8_row", "fp8_e4m3+verify", "int8_row+verify"]
    )
    parser.add_argument("--repeat", type=int, default=2, help="runs of each; the fastest counts")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_here(arguments)
        return
    print(f"{'GB':>4}  {'what':<18} {'s':>7} {'ratio':>6} {'MB above import':>16} {'of 300+4×largest':>17}")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            largest = make_checkpoint(scratch / "model", size) / 2**20
            plain = 0.0
            for what in ["load-and-save", *arguments.formats]:
                runs = [
                    measure(what, scratch / "model", scratch, arguments.workers)
                    for _ in range(arguments.repeat)
                ]
                best = min(runs, key=lambda run: run["seconds"])
                plain = plain or best["seconds"]
                above = max(run["peak"] - run["base"] for run in runs)
                print(
                    f"{size:>4}  {what:<18} {best['seconds']:>7.2f} {best['seconds'] / plain:>6.2f} "
                    f"{above:>16.0f} {above / (300 + 4 * largest):>17.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
