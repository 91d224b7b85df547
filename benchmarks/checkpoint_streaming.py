"""Wall time and peak memory of streaming conversion against plain load-and-save of the same shards.

Each measurement runs in a process of its own, whose imports come before the clock
starts; memory is the peak resident set above what they take. One table at the end::

    python benchmarks/checkpoint_streaming.py            # 0.5 and 2 GB
    python benchmarks/checkpoint_streaming.py --sizes 0.5 2 6
    pip install --target peer convert-to-quant==1.3.4 --no-deps
    python benchmarks/checkpoint_streaming.py --peer peer

convert-to-quant takes one file, so with ``--peer`` the same weights are also written
as one, and our run on that file, in the same ComfyUI layout, stands beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
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
ONE_FILE = "one-file.safetensors"
PEER = "ctq fp8 --simple"
OURS = "fp8_e4m3 one file"


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


def stream(source: Path, target: Path, name: str, check: bool, workers: int, device: str) -> float:
    from qwodel.checkpoint.formats.registry import storage_format
    from qwodel.checkpoint.layouts.transformers import TransformersLayout
    from qwodel.checkpoint.plan.planning import build_plan
    from qwodel.checkpoint.plan.recipe import Recipe
    from qwodel.checkpoint.run.convert import convert_checkpoint
    from qwodel.checkpoint.run.device_executor import executor_for, make_executor
    from qwodel.checkpoint.run.verify import verify
    from qwodel.devices import resolve_device

    base = resident_mb()
    plan = build_plan(source, Recipe(format=storage_format(name), max_shard_size=SHARD), TransformersLayout())
    conversion = convert_checkpoint(plan, target, executor=executor_for(resolve_device(device), workers))
    if check:
        verify(conversion, executor=make_executor(workers))
    return base


def stream_one_file(source: Path, target: Path, workers: int, device: str) -> float:
    """What :func:`convert_with_peer` does, by us, read back too."""
    from qwodel.checkpoint.formats.registry import storage_format
    from qwodel.checkpoint.layouts.comfyui import ComfyUILayout
    from qwodel.checkpoint.plan.planning import build_plan
    from qwodel.checkpoint.plan.recipe import Recipe
    from qwodel.checkpoint.run.convert import convert_checkpoint
    from qwodel.checkpoint.run.device_executor import executor_for, make_executor
    from qwodel.checkpoint.run.verify import verify
    from qwodel.devices import resolve_device

    base = resident_mb()
    plan = build_plan(source, Recipe(format=storage_format("fp8_e4m3")), ComfyUILayout())
    executor = executor_for(resolve_device(device), workers)
    conversion = convert_checkpoint(plan, target / "out.safetensors", executor=executor)
    verify(conversion, executor=make_executor(workers))
    return base


def convert_with_peer(source: Path, target: Path) -> float:
    """convert-to-quant's command in this process, quantizing to FP8 by rounding to nearest."""
    from convert_to_quant.cli.main import main as peer_main

    base = resident_mb()
    output = target / "out.safetensors"
    sys.argv = ["ctq", "-i", str(source), "-o", str(output), "--simple", "--comfy_quant", "--device", "cpu"]
    with contextlib.redirect_stdout(sys.stderr):
        peer_main()
    if not output.is_file():
        raise RuntimeError("convert-to-quant wrote nothing")
    return base


def import_for(what: str, peer: str) -> None:
    """Import what a measurement will call."""
    import safetensors.torch  # noqa: F401

    if what == PEER:
        sys.path.insert(0, peer)
        importlib.import_module("convert_to_quant.cli.main")
    elif what != "load-and-save":
        for name in ("comfyui", "convert", "pipeline", "plan", "transformers_layout", "verify"):
            importlib.import_module(f"qwodel.checkpoint.{name}")


def peer_is_there(folder: str | None) -> bool:
    """Whether convert-to-quant can be compared with; says why not."""
    if folder and importlib.util.find_spec("convert_to_quant") is None:
        sys.path.insert(0, str(Path(folder).resolve()))
    if importlib.util.find_spec("convert_to_quant") is not None:
        return True
    print("convert-to-quant is not compared: pass --peer DIR with convert-to-quant==1.3.4 in it")
    return False


def make_one_file(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = {
        name: tensor
        for shard in sorted(folder.glob("part-*.safetensors"))
        for name, tensor in load_file(shard).items()
    }
    save_file(weights, folder.parent / ONE_FILE, {"format": "pt"})


def measure_here(arguments: argparse.Namespace) -> None:
    """One measurement, in this process; prints JSON."""
    import_for(arguments.measure, arguments.peer or "")
    source, target = Path(arguments.source), Path(arguments.target)
    started = time.perf_counter()
    if arguments.measure == "load-and-save":
        base = load_and_save(source, target)
    elif arguments.measure == OURS:
        base = stream_one_file(source.parent / ONE_FILE, target, arguments.workers, arguments.device)
    elif arguments.measure == PEER:
        base = convert_with_peer(source.parent / ONE_FILE, target)
    else:
        name, _, check = arguments.measure.partition("+")
        base = stream(source, target, name, bool(check), arguments.workers, arguments.device)
    seconds = time.perf_counter() - started
    peak = resident_mb("VmHWM")
    print(json.dumps({"seconds": seconds, "base": base, "peak": peak}))


def measure(
    what: str, source: Path, scratch: Path, workers: int, peer: str | None = None, device: str = "cpu"
) -> dict[str, float]:
    target = scratch / "out"
    target.mkdir()
    os.sync()
    command = [sys.executable, __file__, "--measure", what, "--source", str(source), "--target", str(target)]
    command += ["--workers", str(workers), "--device", device, *(["--peer", peer] if peer else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
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
    parser.add_argument("--device", default="cpu", help="where codes are computed: cpu, cuda, cuda:N, auto")
    parser.add_argument("--peer", help="folder that holds convert-to-quant")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_here(arguments)
        return
    names = ["load-and-save", *arguments.formats]
    if peer_is_there(arguments.peer):
        names += [OURS, PEER]
    print(f"{'GB':>4}  {'what':<18} {'s':>7} {'ratio':>6} {'MB above import':>16} {'of 300+4×largest':>17}")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            largest = make_checkpoint(scratch / "model", size) / 2**20
            if PEER in names:
                # In a process that ends, so that the runs find as much memory as before.
                script = f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; import checkpoint_streaming as b; "
                script += f"b.make_one_file(b.Path({str(scratch / 'model')!r}))"
                subprocess.run([sys.executable, "-c", script], check=True)
            plain = 0.0
            for what in names:
                runs = [
                    measure(
                        what,
                        scratch / "model",
                        scratch,
                        arguments.workers,
                        arguments.peer,
                        arguments.device,
                    )
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
