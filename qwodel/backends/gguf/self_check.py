"""A forward pass of the installed llama.cpp on a model made here. Runs in the worker process only."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Llama

from qwodel.backends.gguf.answers import ForwardPass, SpokenAnswer
from qwodel.backends.gguf.llama import forward_log

__all__ = ["forward", "speak"]

Emit = Callable[[dict[str, Any]], None]

# Wide enough for the block kernels and AMX's tiles of 16 × 64; 150 kB in all.
_WIDTH, _VOCABULARY, _TOKENS = 64, 128, 16


def forward(_: dict[str, Any], emit: Emit) -> ForwardPass:
    """Run a tiny model with the settings every llama.cpp program starts with; return whether it is finite.

    The request is empty. A library that was compiled into something this CPU cannot run ends
    the process here, by a signal.
    """
    forward_log(emit, [])
    with tempfile.TemporaryDirectory(prefix="qwodel-check-") as folder:
        path = Path(folder) / "tiny.gguf"
        _write(path)
        llama = Llama(str(path), n_ctx=_TOKENS, n_batch=_TOKENS, logits_all=True, verbose=False)
        llama.eval([index % _VOCABULARY for index in range(_TOKENS)])
        finite = bool(np.isfinite(llama.scores[:_TOKENS]).all())
        llama.close()
    return {"finite": finite}


def speak(request: dict[str, Any], emit: Emit) -> SpokenAnswer:
    """Load the chat model at ``path`` as any program would; return its greedy ``answer`` and its ``speed``.

    Request keys: ``path``, ``question``. The speed is in tokens a second.
    """
    import time

    forward_log(emit, [])
    llama = Llama(request["path"], n_ctx=512, verbose=False)
    started = time.monotonic()
    reply: Any = llama.create_chat_completion(
        [{"role": "user", "content": request["question"]}], max_tokens=60, temperature=0.0
    )
    speed = reply["usage"]["completion_tokens"] / (time.monotonic() - started)
    return {"answer": str(reply["choices"][0]["message"]["content"]).strip(), "speed": speed}


def _write(path: Path) -> None:
    """Write a Llama of one block in Q8_0, with random weights and no tokenizer."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    random = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(_TOKENS)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(_VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {f"blk.0.{name}": _WIDTH for name in square} | {"token_embd": _VOCABULARY, "output": _VOCABULARY}
    for name, rows in shapes.items():
        values = random.standard_normal((rows, _WIDTH), np.float32) / 8
        raw = quantize(values, GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=GGMLQuantizationType.Q8_0)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
