"""AWQ against round-to-nearest, both W4A16 in groups of 32, on stories15M: KL divergence to the source.

The held-out text is what the source itself writes, sampled at temperature one with a fixed seed; so is
the calibration text, with another seed, and with ``--wikitext`` a file of other text beside it. The
divergence is the mean over tokens, in nats.

    python benchmarks/awq_quality.py --model stories15M [--wikitext wiki.valid.tokens]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qwodel import Quantizer

GROUP, LENGTH = 32, 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("../shared/data/stories15M"))
    parser.add_argument("--wikitext", type=Path, help="text to calibrate on as well")
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()
    if not arguments.model.is_dir():
        print(f"{arguments.model} is not here; nothing to measure")
        return
    logging.getLogger("AWQQuantizer").setLevel(logging.ERROR)
    source = load(arguments.model)
    own, held_out = (sample(source, arguments.samples, seed) for seed in (0, 1))
    texts: dict[str, Any] = {"own stories": own.tolist()}
    if arguments.wikitext:
        texts[arguments.wikitext.name] = str(arguments.wikitext)
    print(f"{arguments.model.name}, group {GROUP}, {arguments.samples} × {LENGTH} tokens\n")
    print(f"{'weights':<11} {'method':<28} {'KL':>7} {'below RTN':>10} {'below W4A16':>12} {'s':>5}")
    plain: dict[bool, float] = {}
    for symmetric in (True, False):
        plain[symmetric] = divergence(source, rounded(arguments.model, symmetric), held_out)
        row(symmetric, "round to nearest", plain[symmetric], plain, None)
        for name, dataset in texts.items():
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                path = Quantizer(
                    "awq", arguments.model, folder, calibration_dataset=dataset, symmetric=symmetric,
                    group_size=GROUP, num_samples=arguments.samples, seq_length=LENGTH, batch_size=8,
                ).quantize("int4")  # fmt: skip
                seconds = time.monotonic() - started
                row(symmetric, f"AWQ on {name}", divergence(source, load(path), held_out), plain, seconds)


def row(symmetric: bool, method: str, value: float, plain: dict[bool, float], seconds: float | None) -> None:
    """Print one line: the divergence, and how far below both kinds of rounding it is."""
    kind = "symmetric" if symmetric else "asymmetric"
    below = [f"{100 * (1 - value / plain[each]):.0f} %" for each in (symmetric, True)]
    shown = "" if seconds is None else f"{seconds:.0f}"
    print(f"{kind:<11} {method:<28} {value:>7.4f} {below[0]:>10} {below[1]:>12} {shown:>5}", flush=True)


def load(path: Path) -> Any:
    """Return a model in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def sample(model: Any, count: int, seed: int) -> torch.Tensor:
    """Return ``[count, LENGTH]`` tokens the model writes."""
    torch.manual_seed(seed)
    start = torch.full((count, 1), 1)
    tokens: torch.Tensor = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0,
        min_length=LENGTH, max_length=LENGTH, pad_token_id=2,
    )  # fmt: skip
    return tokens


@torch.no_grad()
def divergence(source: Any, other: Any, tokens: torch.Tensor) -> float:
    """Return the mean KL divergence per token, in nats."""
    total = 0.0
    for batch in tokens.split(8):
        p = source(input_ids=batch).logits.double().log_softmax(-1)
        q = other(input_ids=batch).logits.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(-1).mean()) * len(batch)
    return total / len(tokens)


@torch.no_grad()
def rounded(path: Path, symmetric: bool) -> Any:
    """Return the model with every linear layer but the head rounded to four bits, group by group."""
    model = load(path)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        blocks = module.weight.reshape(-1, module.in_features // GROUP, GROUP)
        low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
        if symmetric:
            scale, zero = torch.maximum(-low, high) / 7.5, torch.tensor(8.0)
        else:
            scale = (high - low) / 15
            zero = (-low / scale).round()
        codes = ((blocks / scale).round() + zero).clamp(0, 15)
        module.weight.copy_(((codes - zero) * scale).reshape_as(module.weight))
    return model


if __name__ == "__main__":
    main()
