"""Perplexity of W8A8: full precision, naive, SmoothQuant as published, and qwodel's.

Arithmetic is simulated in fp32 (weights and inputs of all linear layers but the head). Calibration and
evaluation texts differ. ``folded`` changes weights only, so that any reader computes it; ``rotated``
also rotates inputs at run time, which qwodel's INT8 linear does. One table::

    python benchmarks/smoothquant_quality.py --calibration wiki.valid.tokens --test wiki.test.raw
    python benchmarks/smoothquant_quality.py --calibration … --test … --model DIR --windows 24 --length 512
"""

from __future__ import annotations

import argparse
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from qwodel.smoothquant import Scheme, fake_quantized, smooth_model
from qwodel.smoothquant.calibration import calibrate
from qwodel.smoothquant.ppl_eval import perplexity

SCHEMES = {
    "channel / token": ("channel", "token"),
    "channel / tensor": ("channel", "tensor"),
    "tensor / tensor": ("tensor", "tensor"),
}


def tokens(tokenizer: Any, file: Path, count: int) -> torch.Tensor:
    """The first ``count`` token ids of a file."""
    ids: list[int] = []
    for piece in file.read_text("utf-8").splitlines(keepends=True):
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(ids) >= count:
            return torch.tensor(ids[:count])
    raise SystemExit(f"{file} holds {len(ids)} tokens, fewer than {count}")


def variants(scheme: tuple[str, str]) -> dict[str, tuple[Scheme, dict[str, Any] | None]]:
    """Label → what is rounded with, and how the model is smoothed first."""
    plain = Scheme(*scheme)  # type: ignore[arg-type]
    turned = Scheme(*scheme, rotate_inputs=256)  # type: ignore[arg-type]
    return {
        "naive": (plain, None),
        "published, α = 0.8": (plain, {"alpha": 0.8}),
        "qwodel, folded": (plain, {"alpha": "search", "head_rotations": True, "scheme": plain}),
        "qwodel, rotated": (turned, {"alpha": "search", "scheme": turned}),
    }


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
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qwodel.cache import cache_dir
    from qwodel.demo import demo_model

    folder = given.model or demo_model(cache_dir())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = tokens(tokenizer, given.test, given.windows * given.length).split(given.length)
    text = tokens(tokenizer, given.calibration, given.samples * given.length).reshape(-1, given.length)
    statistics = calibrate(model, text.split(4), sampled_tokens=256)
    exact = perplexity(model, windows)
    print(f"{folder.name}, {given.windows} × {given.length} tokens, fp32 perplexity {exact:.3f}\n")
    print(f"{'weights / inputs':18}{'':22}{'perplexity':>11}{'change':>10}{'logits':>10}{'s':>7}")
    for label, scheme in SCHEMES.items():
        for name, (rounding, smoothing) in variants(scheme).items() if label in given.schemes else ():
            started, changed, smoothed = time.monotonic(), 0.0, model
            if smoothing is not None:
                smoothed = deepcopy(model)
                changed = smooth_model(smoothed, statistics, **smoothing).change
            with fake_quantized(smoothed, rounding):
                found = perplexity(smoothed, windows)
            seconds = time.monotonic() - started
            print(
                f"{label:18}{name:22}{found:11.3f}{found / exact - 1:+10.2%}{changed:10.1e}{seconds:7.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
