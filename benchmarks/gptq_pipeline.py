"""GPTQ of a whole model against llm-compressor's, on the same tokens: seconds, memory, KL divergence.

Both take SmolLM2-135M-Instruct in bf16, 32 × 512 tokens of ``--calibration``, INT8 weights with one
symmetric scale a row, every linear layer but the head, GPTQ with act-order of each one's default kind, on
the CPU; ours with and without making up for earlier layers (GPTAQ). Each runs in a process of its own; time is that of the call alone, without imports; memory is the
peak of the process. Then every layer is decoded to fp32 and the next-token distributions on ``--heldout``
are compared with the unquantized model's.

    python benchmarks/gptq_pipeline.py --calibration wiki.valid.tokens --heldout wiki.test.raw
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwodel.cache import cache_dir
from qwodel.calibration import load_tokens
from qwodel.demo import demo_model
from qwodel.int8 import read_weights

SAMPLES, LENGTH = 32, 512

_MEASURE = """
import json, resource, sys, time
model, tokens, output = sys.argv[1:4]
import numpy as np
rows = np.load(tokens)
"""
_REPORT = """
seconds = time.perf_counter() - start
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1]
print(json.dumps([seconds, int(peak) / 1024]))
"""
_OURS = (
    _MEASURE
    + """
from qwodel import Quantizer
import qwodel.backends.int8, qwodel.modeling.calibrated, transformers
start = time.perf_counter()
Quantizer("int8", model, output, optimizer=sys.argv[4], layout="comfyui",
          **({"calibration_dataset": rows.tolist(), "num_samples": len(rows), "seq_length": rows.shape[1]}
             if sys.argv[4] != "none" else {})).quantize("int8_row")
"""
    + _REPORT
)
_PEER = (
    _MEASURE
    + """
import logging, torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    from llmcompressor.pipelines.cache import IntermediatesCache
    IntermediatesCache.pin_memory = lambda self, *a, **k: None  # there is no device to pin for
except (ImportError, AttributeError):
    pass
start = time.perf_counter()
loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()})
recipe = GPTQModifier(ignore=["lm_head"], config_groups={"group_0": {
    "targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}})
oneshot(model=loaded, dataset=data, recipe=recipe, max_seq_length=rows.shape[1],
        num_calibration_samples=len(rows), output_dir=output, processor=AutoTokenizer.from_pretrained(model))
"""
    + _REPORT
)


def run(program: str, *arguments: object) -> tuple[float, float]:
    """Seconds and megabytes of a program in a process of its own."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
    return seconds, megabytes


def decoded(path: Path) -> dict[str, torch.Tensor]:
    """Every weight of an output as fp32."""
    if (path / "config.json").exists():
        from transformers import CompressedTensorsConfig

        plain = CompressedTensorsConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=plain)
        return {name: each.float() for name, each in model.state_dict().items()}
    return {name: each.float() for name, each in read_weights(next(path.glob("*.safetensors")))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=1, help="interleaved runs; the median counts")
    parser.add_argument("--score", type=int, default=24, help="held-out sequences")
    parser.add_argument("--no-peer", action="store_true", help="without llm-compressor")
    arguments = parser.parse_args()
    source = demo_model(cache_dir())
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = load_tokens(str(arguments.calibration), tokenizer, num_samples=SAMPLES, seq_length=LENGTH)
    found: dict[str, list[tuple[float, float]]] = {}
    weights: dict[str, dict[str, torch.Tensor]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        np.save(folder / "tokens.npy", rows)
        for number in range(arguments.rounds):
            for name, program, extra in (
                ("round to nearest", _OURS, ["none"]),
                ("llm-compressor GPTQ", _PEER, []),
                ("qwodel GPTQ", _OURS, ["gptq"]),
                ("qwodel GPTAQ", _OURS, ["gptaq"]),
            ):
                if arguments.no_peer and program is _PEER:
                    continue
                output = folder / f"{name.replace(' ', '-')}-{number}"
                cost = run(program, source, folder / "tokens.npy", output, *extra)
                found.setdefault(name, []).append(cost)
                weights[name] = decoded(output)
                print(f"{name}: {cost[0]:.0f} s, {cost[1]:.0f} MB", file=sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    original = {name: each.detach().clone() for name, each in model.state_dict().items()}
    text = arguments.heldout.read_text("utf-8")[: arguments.score * LENGTH * 12]
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0][: arguments.score * LENGTH]
    ids = ids.reshape(-1, LENGTH)
    with torch.no_grad():
        reference = [model(row[None]).logits[0].log_softmax(dim=-1) for row in ids]
    print("| method | s | peak MB | KL ×1000 |")
    print("|---|---|---|---|")
    for name, costs in found.items():
        changed = {key: each for key, each in weights[name].items() if key.endswith("proj.weight")}
        model.load_state_dict(original | changed)
        with torch.no_grad():
            logs = [model(row[None]).logits[0].log_softmax(dim=-1) for row in ids]
        kl = [float((a.exp() * (a - b)).sum(dim=-1).mean()) for a, b in zip(reference, logs, strict=True)]
        seconds, megabytes = (statistics.median(cost[i] for cost in costs) for i in (0, 1))
        print(f"| {name} | {seconds:.0f} | {megabytes:.0f} | {1000 * statistics.mean(kl):.3f} |")


if __name__ == "__main__":
    main()
