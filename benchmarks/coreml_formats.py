"""The Core ML formats on one model: size, agreement with torch, seconds, peak memory.

Each format runs in a fresh process, which samples its resident memory stage by stage. The written
program is then evaluated on text that the model itself writes (sampled with a fixed seed) and compared with
the float32 logits of torch there: relative error ‖a − b‖ / ‖b‖, mean KL divergence in nats, and how often
the likeliest token is the same. An encoder gets random tokens, and the least cosine instead.

With ``--palettes`` also: palettes of groups of 32 channels by qwodel and by coremltools' exact k-means.

Usage: ``python benchmarks/coreml_formats.py [MODEL_DIR] [--formats float16,int4] [--palettes]``
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from qwodel import Quantizer
from qwodel.cache import cache_dir
from qwodel.demo import demo_model

_FORMATS = ("float16", "int8_linear", "int8_symmetric", "int6", "int4")
_TEXTS, _TOKENS = 4, 128
_SAMPLE_SECONDS = 0.02
_STAGES = ("convert", "quantize", "verify")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, help="a Hugging Face directory; default: the demo")
    parser.add_argument("--formats", default=",".join(_FORMATS))
    parser.add_argument("--palettes", action="store_true", help="compare palettes with coremltools' k-means")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, out = arguments.child
        print(json.dumps(_run(arguments.model, name, Path(out))))
        return
    model = (arguments.model or demo_model(cache_dir(), print)).resolve()
    with tempfile.TemporaryDirectory(prefix="qwodel-bench-") as folder:
        rows = [_row(model, name, Path(folder)) for name in arguments.formats.split(",")]
    print(f"{model.name}, {rows[0]['parameters']:,} parameters; memory is resident, in MB\n")
    print(f"{'format':<16}{'MB':>8}{'ratio':>7}{'rel. error':>12}{'KL':>10}{'top-1':>7}{'s':>7}", end="")
    print("".join(f"{stage:>10}" for stage in _STAGES))
    for row in rows:
        quality = f"{row['relative_error']:>12.2e}{row['kl']:>10}{row['top1']:>7}"
        memory = "".join(f"{row['memory'].get(stage, 0) / 1e6:>10.0f}" for stage in _STAGES)
        print(
            f"{row['format']:<16}{row['mb']:>8.1f}{row['ratio']:>7.2f}{quality}{row['seconds']:>7.1f}{memory}"
        )
    if arguments.palettes:
        _palettes(model)


def _row(model: Path, name: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, str(model), "--child", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    if done.returncode != 0:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**row, **_compare(model, Path(row["package"]))}


def _run(model: Path, name: str, folder: Path) -> dict[str, Any]:
    memory: dict[str, int] = {}
    stage, stop = ["resolve"], threading.Event()

    def sample() -> None:
        process = psutil.Process()
        while not stop.wait(_SAMPLE_SECONDS):
            memory[stage[0]] = max(memory.get(stage[0], 0), process.memory_info().rss)

    def callback(_: int, now: str, __: str) -> None:
        stage[0] = now

    threading.Thread(target=sample, daemon=True).start()
    quantizer = Quantizer("coreml", model, folder, callback)
    started = time.perf_counter()
    path = quantizer.quantize(name)
    seconds = time.perf_counter() - started
    stop.set()
    info = quantizer.get_model_info()
    package = path / info["package"]
    stored = sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
    return {
        "format": name, "package": str(package), "seconds": seconds, "memory": memory, "mb": stored / 1e6,
        "ratio": info["compression_ratio"], "parameters": info["parameters"],
    }  # fmt: skip


def _compare(model: Path, package: Path) -> dict[str, Any]:
    import torch

    from qwodel.backends.coreml.mil.evaluate import Evaluator
    from qwodel.backends.coreml.mil.program import Program
    from qwodel.backends.coreml.toolchain import quiet_coremltools

    quiet_coremltools()
    program = Program(package)
    decoder = "logits" in program.outputs
    ids, expected = _reference(model, decoder)
    evaluator = Evaluator(program)
    ones = torch.ones(1, ids.shape[1], dtype=torch.int32)
    rows = [evaluator.run({"input_ids": row[None].int(), "attention_mask": ones}) for row in ids]
    found = torch.cat([row[program.outputs[0]] for row in rows]).double()
    error = float((found - expected).norm() / expected.norm())
    if not decoder:
        cosine = float(torch.cosine_similarity(found, expected, dim=-1).min())
        return {"relative_error": error, "kl": f"cos {cosine:.4f}", "top1": "–"}
    target = expected.log_softmax(-1)
    divergence = float((target.exp() * (target - found.log_softmax(-1))).sum(-1).mean())
    same = float((found.argmax(-1) == expected.argmax(-1)).double().mean())
    return {"relative_error": error, "kl": f"{divergence:.2e}", "top1": f"{same:.3f}"}


_KNOWN: dict[Path, Any] = {}


def _reference(model: Path, decoder: bool) -> Any:
    """Token ids [texts, tokens] and torch's outputs there in float64, once a model."""
    import torch
    import transformers

    if model not in _KNOWN:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.manual_seed(0)
        loader = transformers.AutoModelForCausalLM if decoder else transformers.AutoModel
        network = loader.from_pretrained(model, dtype=torch.float32)
        if decoder:
            start = torch.full((_TEXTS, 1), network.config.bos_token_id or 0)
            ids = network.generate(
                start, max_length=_TOKENS, min_length=_TOKENS, do_sample=True, top_k=0,
                pad_token_id=network.config.eos_token_id or 0,
            )  # fmt: skip
        else:
            ids = torch.randint(1000, network.config.vocab_size, (_TEXTS, _TOKENS))
        with torch.no_grad():
            output = network(input_ids=ids, attention_mask=torch.ones_like(ids))
        _KNOWN[model] = ids, output[0].double()
    return _KNOWN[model]


def _palettes(model: Path) -> None:
    """Time and error of palettes of the first 20 groups of each of three matrices."""
    from coremltools._deps import _kmeans1d
    from safetensors import safe_open

    from qwodel.backends.coreml.compress import palettize

    print(f"\n{'palettes of 32 channels':<44}{'bits':>5}{'qwodel ms':>11}{'exact ms':>10}{'loss (dB)':>11}")
    with safe_open(next(model.glob("*.safetensors")), "pt") as file:
        names = [name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2]  # noqa: SIM118
        for name in (names[0], names[len(names) // 2], names[-1]):
            weights = file.get_tensor(name).float().numpy().astype(np.float16)
            groups = [weights[at : at + 32] for at in range(0, min(len(weights) // 32 * 32, 640), 32)]
            for bits in (4, 6):
                started = time.perf_counter()
                ours = [_error(group, *palettize(group, bits)) for group in groups]
                middle = time.perf_counter()
                exact = []
                for group in groups:
                    values, back, counts = np.unique(group, return_inverse=True, return_counts=True)
                    found = _kmeans1d.cluster(values, 1 << bits, weights=counts)
                    codes = np.array(found.clusters)[back].reshape(group.shape)
                    exact.append(_error(group, np.array(found.centroids), codes))
                last = time.perf_counter() - middle
                loss = 10 * np.log10(sum(ours) / sum(exact))
                per = 1e3 / len(groups)
                print(f"{name:<44}{bits:>5}{(middle - started) * per:>11.1f}{last * per:>10.1f}{loss:>11.4f}")


def _error(group: np.ndarray, palette: np.ndarray, codes: np.ndarray) -> float:
    return float(((group.astype(np.float64) - palette.astype(np.float64)[codes]) ** 2).sum())


if __name__ == "__main__":
    main()
