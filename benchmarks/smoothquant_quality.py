"""Perplexity of W8A8: full precision, naive, SmoothQuant as published, and qwodel's.

Arithmetic is simulated in fp32 (weights and inputs of all linear layers but the head). Calibration and
evaluation texts differ. ``folded`` changes weights only, so that any reader computes it; ``rotated``
also rotates inputs at run time, which qwodel's INT8 linear does; ``+ GPTQ`` rounds weights by GPTQ on the
calibration text instead of to nearest.

``change`` is that of the perplexity. On 12,000 tokens it is known to a few tenths of a percent, since every
rounding moves tokens up and down; ``KL`` (thousandths of a nat a token, on the first windows) has less
noise and tells variants apart. One table::

    python benchmarks/smoothquant_quality.py --calibration wiki.valid.tokens --test wiki.test.raw
    python benchmarks/smoothquant_quality.py --calibration … --test … --model DIR --length 256 \\
        --schemes "channel / token" --rows naive folded "folded + GPTQ"
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwodel.algorithms.data_aware import DataAware
from qwodel.algorithms.quant_types import INT8, ROW
from qwodel.checkpoint.rounding.methods import FromStatistics, LayerWeight
from qwodel.modeling.collect import collect_statistics
from qwodel.smoothquant import ActivationStatistics, Scheme, fake_quantized, smooth_model
from qwodel.smoothquant.calibration import calibrate
from qwodel.smoothquant.input_rotation import rotated
from qwodel.smoothquant.simulate import quantizable_layers

SCHEMES = {
    "channel / token": ("channel", "token"),
    "channel / tensor": ("channel", "tensor"),
    "tensor / tensor": ("tensor", "tensor"),
}
ROWS = ("naive", "published", "folded", "folded + GPTQ", "rotated", "rotated + GPTQ")


def tokens(tokenizer: Any, file: Path, count: int) -> torch.Tensor:
    """The first ``count`` token ids of a file."""
    ids: list[int] = []
    for piece in file.read_text("utf-8").splitlines(keepends=True):
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(ids) >= count:
            return torch.tensor(ids[:count])
    raise SystemExit(f"{file} holds {len(ids)} tokens, fewer than {count}")


@dataclass
class Evaluation:
    """Windows of the test text, and what the full-precision model says of the first of them."""

    windows: Sequence[torch.Tensor]
    reference: list[torch.Tensor]
    exact: float = 0.0

    @torch.no_grad()
    def measure(self, model: Any, compare: int) -> tuple[float, float]:
        """Perplexity, and the KL divergence from the first call's model, whose ``compare`` windows are kept."""
        first, loss, divergence, count = not self.reference, 0.0, 0.0, 0
        for number, ids in enumerate(self.windows):
            tell(f"window {number + 1} of {len(self.windows)}")
            found = model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
            loss -= float(found[:-1].gather(1, ids[1:, None]).double().sum())
            count += len(ids) - 1
            if first and number < compare:
                self.reference.append(found)
            elif number < compare:
                known = self.reference[number]
                divergence += float((known.exp() * (known - found)).sum().double()) / len(ids)
        return math.exp(loss / count), divergence / max(len(self.reference), 1)


def tell(text: str) -> None:
    """Progress, on a terminal's last line or not at all."""
    if sys.stderr.isatty():
        print(f"\r{text:60}\r", end="", file=sys.stderr, flush=True)


def solve(model: Any, text: torch.Tensor) -> None:
    """Round a smoothed model's weights by GPTQ, in place."""
    names = list(quantizable_layers(model))
    with tempfile.TemporaryDirectory() as folder:
        tell("summing up inputs")
        file = collect_statistics(
            model, text.split(2), Path(folder) / "inputs.safetensors", layers=names, even=True
        )
        method = FromStatistics(file, DataAware("gptq"), "gptq")
        for name, layer in quantizable_layers(model).items():
            tell(f"GPTQ of {name}")
            codes = method.round(LayerWeight(name, layer.weight.data, INT8, ROW)).codes
            layer.weight.data = codes.dequantize()


def row(
    name: str,
    scales: tuple[str, str],
    model: Any,
    statistics: ActivationStatistics,
    text: torch.Tensor,
    evaluation: Evaluation,
    compare: int,
) -> tuple[float, float, float]:
    """Perplexity, KL divergence and the change of logits that smoothing made."""
    plain = Scheme(*scales)  # type: ignore[arg-type]
    turned = Scheme(*scales, rotate_inputs=256)  # type: ignore[arg-type]
    changed, copy = 0.0, deepcopy(model)
    wanted = turned if name.startswith("rotated") else plain
    tell("smoothing")
    if name == "published":
        changed = smooth_model(copy, statistics, 0.8).change
    elif name != "naive":
        folded = name.startswith("folded")
        changed = smooth_model(copy, statistics, "search", head_rotations=folded, scheme=wanted).change
    if not name.endswith("GPTQ"):
        with fake_quantized(copy, wanted):
            return (*evaluation.measure(copy, compare), changed)
    with rotated(copy, wanted):
        solve(copy, text)
        # Weights are on their grid, in the basis that inputs are turned into.
        with fake_quantized(copy, plain, weights=False):
            return (*evaluation.measure(copy, compare), changed)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model directory; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--samples", type=int, default=12, help="calibration sequences of --length tokens")
    parser.add_argument("--compare", type=int, default=8, help="windows for the KL divergence")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), help="GPTQ's are of scales a channel only"
    )
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qwodel.cache import cache_dir
    from qwodel.demo import demo_model

    folder = given.model or demo_model(cache_dir())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    evaluation = Evaluation(
        tokens(tokenizer, given.test, given.windows * given.length).split(given.length), []
    )
    text = tokens(tokenizer, given.calibration, given.samples * given.length).reshape(-1, given.length)
    tell("calibrating")
    statistics = calibrate(model, text.split(4), sampled_tokens=256)
    exact, _ = evaluation.measure(model, given.compare)
    print(f"{folder.name}, {given.windows} × {given.length} tokens, fp32 perplexity {exact:.3f}\n")
    print(f"{'weights / inputs':18}{'':16}{'perplexity':>11}{'change':>10}{'KL':>9}{'logits':>9}{'s':>6}")
    for label in given.schemes:
        for name in given.rows:
            if name.endswith("GPTQ") and not label.startswith("channel / token"):
                continue
            started = time.monotonic()
            found, divergence, changed = row(
                name, SCHEMES[label], model, statistics, text, evaluation, given.compare
            )
            seconds = time.monotonic() - started
            print(
                f"{label:18}{name:16}{found:11.3f}{found / exact - 1:+10.2%}{divergence * 1e3:9.2f}"
                f"{changed:9.0e}{seconds:6.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
