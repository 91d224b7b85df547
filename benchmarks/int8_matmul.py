"""INT8 against bf16 and fp32 on this machine: one matrix, and a whole model's prefill.

All timings of a table come from one process, in turns; the least of the repeats counts. With a CUDA
GPU, ``--device cuda`` compares with fp16. One table each::

    python benchmarks/int8_matmul.py                      # SmolLM2's shape, random weights
    python benchmarks/int8_matmul.py --hidden 2048 --ffn 8192 --layers 8 --threads 2 --repeat 7
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch

from qwodel.modules.int8_linear import Int8Linear
from qwodel.smoothquant import Int8ForCausalLM


def in_turns(runs: dict[str, Callable[[], object]], repeat: int, device: str) -> dict[str, float]:
    """Seconds of each run's fastest turn, after one to warm up; a busy moment hits all alike."""
    fastest = dict.fromkeys(runs, math.inf)
    for turn in range(repeat + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                fastest[name] = min(fastest[name], time.perf_counter() - started)
    return fastest


def matrices(size: int, repeat: int, device: str, dtypes: dict[str, torch.dtype]) -> None:
    """Milliseconds of one ``size × size`` layer."""
    print(
        f"one {size} × {size} layer, ms\n\n{'tokens':>7}"
        + "".join(f"{name:>9}" for name in (*dtypes, "int8"))
    )
    linear = torch.nn.Linear(size, size, bias=False)
    half = next(reversed(dtypes.values()))
    layers = {name: (deepcopy(linear).to(device, dtype), dtype) for name, dtype in dtypes.items()}
    layers["int8"] = (Int8Linear.from_float(linear).to(device), half)
    for rows in (1, 64, 128, 256, 512):
        runs = {
            name: partial(layer, torch.randn(rows, size, device=device, dtype=dtype))
            for name, (layer, dtype) in layers.items()
        }
        seconds = in_turns(runs, repeat, device)
        print(f"{rows:7}" + "".join(f"{each * 1e3:9.3f}" for each in seconds.values()), flush=True)


def model_of(given: argparse.Namespace) -> Any:
    """A random Llama of the asked shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=given.hidden,
        intermediate_size=given.ffn,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def footprint(model: Any) -> int:
    """Bytes of parameters and buffers, tied ones once."""
    tensors = {each.data_ptr(): each for each in (*model.parameters(), *model.buffers())}
    return sum(each.numel() * each.element_size() for each in tensors.values())


def whole_model(given: argparse.Namespace, dtypes: dict[str, torch.dtype]) -> None:
    """Tokens a second and memory of a prefill."""
    device, ids = given.device, torch.randint(0, 32000, (1, given.tokens), device=given.device)
    exact = model_of(given)
    models = {name: deepcopy(exact).to(device, dtype) for name, dtype in dtypes.items()}
    half = list(dtypes)[-1]
    models[f"int8 ({half} around)"] = Int8ForCausalLM.from_float(exact.to(dtypes[half])).to(device)
    print(f"\n{given.layers} layers of {given.hidden} / {given.ffn}, prefill of {given.tokens} tokens\n")
    print(f"{'':20}{'tokens/s':>10}{'against ' + half:>15}{'MB':>9}")
    # As generate does: no gradients, and logits of the last token only.
    runs = {
        name: partial(model, input_ids=ids, use_cache=False, logits_to_keep=1)
        for name, model in models.items()
    }
    with torch.no_grad():
        seconds = in_turns(runs, given.repeat, device)
    for name, model in models.items():
        ratio = seconds[half] / seconds[name]
        print(f"{name:20}{given.tokens / seconds[name]:10.0f}{ratio:15.2f}{footprint(model) / 1e6:9.0f}")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--size", type=int, default=2048, help="of the single layer")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if given.device == "cuda":
        dtypes = {"fp32": torch.float32, "fp16": torch.float16}
    with torch.no_grad():
        matrices(given.size, given.repeat, given.device, dtypes)
    whole_model(given, dtypes)


if __name__ == "__main__":
    main()
