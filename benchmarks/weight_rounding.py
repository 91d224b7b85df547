"""What data-aware rounding wins: outputs of every layer, and the whole model, against round-to-nearest.

Each method makes a whole file through ``Quantizer``, calibrated on ``--calibration``; every linear layer
is decoded from that file. Then, on held-out text:

* output SQNR: mean over layers of 10·log₁₀(‖XWᵀ‖²/‖XWᵀ − XŴᵀ‖²), X from the unquantized model on text
  of *another kind* (the Python language reference that comes with CPython), and on ``--heldout``, text of
  the calibration's kind; "W8A8" also rounds X to INT8 token by token, in the rotated basis for ConvRot, as
  ComfyUI does. ``--layers`` names the layers that count;
* KL divergence of the next-token distributions from the unquantized model's, and perplexity, on
  ``--heldout``; all weights decoded to fp32.

    python benchmarks/weight_rounding.py --calibration wiki.valid.tokens --heldout wiki.test.raw
    python benchmarks/weight_rounding.py --model DIR --methods int8_row/none,int8_row/gptq …
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwodel.algorithms.hadamard import convrot_weight
from qwodel.algorithms.quant_types import INT8, ROW
from qwodel.algorithms.scales import quantize_matrix
from qwodel.cache import cache_dir
from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.formats.convrot import RotatedDecoder
from qwodel.checkpoint.source.dequantize_sources import resolve_sources
from qwodel.demo import demo_model

METHODS = (
    "int8_row/none", "int8_row/gptq", "int8_row/gptaq", "int8_row/quip", "int8_tensor/none", "int8_tensor/gptq",
    "int8_convrot/none", "int8_convrot/gptq", "int8_convrot/gptaq",
    "fp8_e4m3/none", "fp8_e4m3/gptq", "fp8_e4m3/gptaq", "fp8_e4m3_row/none", "fp8_e4m3_row/search", "fp8_e4m3_row/gptq", "fp8_e4m3_row/gptaq",
)  # fmt: skip

_CHILD = """
import json, sys, time
from qwodel import Quantizer
kind, optimizer, model, output, data = sys.argv[1:6]
options = {"layout": "comfyui", "optimizer": optimizer}
if data:
    options["calibration_dataset"] = data
    options["num_samples"], options["seq_length"] = int(sys.argv[6]), 512
start = time.perf_counter()
path = Quantizer(kind.split("_")[0], model, output, **options).quantize(kind)
seconds = time.perf_counter() - start
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1]
print(json.dumps([str(path), seconds, int(peak) / 1024]))
"""


@dataclass
class Result:
    """One method's file and what was measured of it."""

    path: Path
    seconds: float
    megabytes: float
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    rotations: dict[str, int] = field(default_factory=dict)
    sqnr: dict[str, dict[str, float]] = field(default_factory=dict)


def make(method: str, model: Path, calibration: Path, samples: int, folder: Path) -> Result:
    """Quantize in a process of its own, where the folder does not hold the file."""
    kind, optimizer = method.split("/")
    data = (
        str(calibration)
        if optimizer in ("gptq", "gptaq", "quip", "adamw", "radam", "ppsf", "original")
        else ""
    )
    output = folder / method.replace("/", "-")
    if output.is_dir():
        return Result(next(output.glob("*.safetensors")), math.nan, math.nan)
    command = [sys.executable, "-c", _CHILD, kind, optimizer, str(model), str(output), data, str(samples)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    path, seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return Result(Path(path), seconds, peak)


def decode(result: Result) -> None:
    """Read every quantized layer back from the file alone."""
    with UnifiedSafetensorsLoader(result.path) as reader:
        for source in resolve_sources(reader).tensors:
            if source.decoder is None:
                continue
            layer = source.name.removesuffix(".weight")
            result.weights[layer] = source.row_decoder.rows(reader, 0, source.shape[0]).float()
            if isinstance(source.decoder, RotatedDecoder):
                result.rotations[layer] = source.decoder.size


def measure_layers(model: Any, batches: torch.Tensor, results: dict[str, Result], column: str) -> None:
    """Output SQNR of every layer and method from the layers' real inputs: ``column``, and its W8A8."""
    signal: dict[str, float] = {}
    noise: dict[tuple[str, str, str], float] = {}

    def hook(name: str) -> Any:
        def watch(_: nn.Linear, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            x, y = args[0].flatten(0, -2), output.flatten(0, -2)
            signal[name] = signal.get(name, 0.0) + float(y.double().square().sum())
            for method, result in results.items():
                weight = result.weights.get(name)
                if weight is None:
                    continue
                seen = {column: x}
                if method.startswith("int8"):
                    seen[f"{column}, W8A8"] = int8_inputs(x, result.rotations.get(name))
                for kind, inputs in seen.items():
                    error = float((inputs @ weight.T - y).double().square().sum())
                    noise[method, kind, name] = noise.get((method, kind, name), 0.0) + error

        return watch

    layers = {name for result in results.values() for name in result.weights}
    hooks = [
        module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name in layers
    ]
    with torch.no_grad():
        for row in batches:
            model.model(row[None])
    for each in hooks:
        each.remove()
    for (method, kind, name), error in noise.items():
        results[method].sqnr.setdefault(kind, {})[name] = 10 * math.log10(signal[name] / error)


def int8_inputs(x: torch.Tensor, rotation: int | None) -> torch.Tensor:
    """Inputs as an INT8 kernel sees them: rounded token by token, rotated first where weights are."""
    turned = x if rotation is None else convrot_weight(x, rotation)
    rounded = quantize_matrix(turned, INT8, ROW).dequantize()
    return rounded if rotation is None else convrot_weight(rounded, rotation)


def measure_model(model: Any, batches: torch.Tensor, logits: list[torch.Tensor]) -> tuple[float, float]:
    """KL divergence from ``logits`` and perplexity."""
    divergence, loss, count = 0.0, 0.0, 0
    with torch.no_grad():
        for row, reference in zip(batches, logits, strict=True):
            found = model(row[None]).logits[0].log_softmax(dim=-1)
            divergence += float((reference.exp() * (reference - found)).sum())
            loss -= float(found[:-1].gather(1, row[1:, None]).sum())
            count += len(row)
    return divergence / count, math.exp(loss / (count - len(batches)))


def tokens(tokenizer: Any, text: str, rows: int, length: int) -> torch.Tensor:
    """The first ``rows`` sequences of a text."""
    ids = tokenizer(text[: rows * length * 12], return_tensors="pt", verbose=False).input_ids[0]
    return ids[: rows * length].reshape(rows, length)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="a model directory; SmolLM2-135M-Instruct from PyPI if not given"
    )
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences of 512 tokens")
    parser.add_argument("--score", type=int, default=24, help="held-out sequences")
    parser.add_argument("--layers", default="", help="regular expression of the layers whose SQNR counts")
    parser.add_argument("--keep", type=Path, help="folder for the files; those in it are scored again")
    arguments = parser.parse_args()
    source = arguments.model or demo_model(cache_dir())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    length = min(512, model.config.max_position_embeddings)
    tokenizer = AutoTokenizer.from_pretrained(source)
    other = tokens(tokenizer, "\n".join(topics[key] for key in sorted(topics)), 4, length)
    heldout = tokens(tokenizer, arguments.heldout.read_text("utf-8"), arguments.score, length)
    with torch.no_grad():
        logits = [model(row[None]).logits[0].log_softmax(dim=-1) for row in heldout]
    original = {name: each.detach().clone() for name, each in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as scratch:
        results = {}
        for method in arguments.methods.split(","):
            start = time.perf_counter()
            results[method] = make(
                method, source, arguments.calibration, arguments.samples, arguments.keep or Path(scratch)
            )
            decode(results[method])
            print(f"{method}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    measure_layers(model, other, results, "another kind")
    measure_layers(model, heldout[:4], results, "same kind")
    print(f"{source.name}: {len(next(iter(results.values())).weights)} layers, "
          f"perplexity {measure_model(model, heldout, logits)[1]:.3f}")  # fmt: skip
    columns = ("another kind", "another kind, W8A8", "same kind", "same kind, W8A8")
    print(
        "| format | rounding | output SQNR, dB: "
        + " | ".join(columns)
        + " | KL ×1000 | of nearest | perplexity | s | MB |"
    )
    print("|---" * 11 + "|")
    nearest: dict[str, float] = {}
    for method, result in results.items():
        kind, optimizer = method.split("/")
        changed = {f"{name}.weight": weight for name, weight in result.weights.items()}
        model.load_state_dict(original | changed)
        divergence, perplexity = measure_model(model, heldout, logits)
        if optimizer == "none":
            nearest[kind] = divergence
        share = f"{divergence / nearest[kind]:.2f}" if kind in nearest else "–"
        decibels = " | ".join(mean(result.sqnr.get(column, {}), arguments.layers) for column in columns)
        print(f"| {kind} | {optimizer} | {decibels} | {1000 * divergence:.3f} | {share} | {perplexity:.3f} "
              f"| {result.seconds:.0f} | {result.megabytes:.0f} |", flush=True)  # fmt: skip


def mean(sqnr: dict[str, float], layers: str) -> str:
    """The mean over the layers whose names match, or a dash."""
    chosen = [value for name, value in sqnr.items() if re.search(layers, name)]
    return f"{sum(chosen) / len(chosen):.2f}" if chosen else "–"


if __name__ == "__main__":
    main()
