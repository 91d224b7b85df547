"""llama.cpp through its bindings: quantize a file, load the result. Runs in the worker process only."""

from __future__ import annotations

import ctypes
import errno
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as lib

from qwodel.backends.gguf.answers import LoadedModel
from qwodel.backends.gguf.imatrix import ImportanceMatrix, read_imatrix

__all__ = [
    "batch_of",
    "forward_log",
    "ggml_type_number",
    "load_model",
    "quantize_and_load",
    "safe_model_params",
    "tokenize",
]

Emit = Callable[[dict[str, Any]], None]

_ROW_BUFFER = 256 << 20  # bytes of rows held at once; llama.cpp's own default is 8 GiB
_FORWARD_TOKENS = 8  # enough for attention to mix positions, few enough for a large model
_KEEP: list[Any] = []  # native code holds pointers to these for the life of the process


def forward_log(emit: Emit, errors: list[str]) -> None:
    """Send llama.cpp's log to the parent, and collect its error lines in ``errors``."""

    def log(level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace")
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            errors.append(line.strip(" \n="))
        emit({"log": line, "level": int(level)})

    callback = lib.llama_log_callback(log)
    _KEEP.append(callback)
    lib.llama_log_set(callback, ctypes.c_void_p(0))


def quantize_and_load(request: dict[str, Any], emit: Emit) -> LoadedModel:
    """Quantize ``source`` to ``target``, then load the result as any llama.cpp program would.

    Request keys: ``source``, ``target``, ``ftype``, ``nthread``, ``allow_requantize``,
    ``pure``, ``output_tensor_type``, ``token_embedding_type``, ``tensor_types`` (pairs),
    ``imatrix`` (a file, or ``None``), ``probe`` (text to tokenize with the result).
    """
    errors: list[str] = []
    source, target = request["source"].encode(), request["target"].encode()
    params = _parameters(request)
    emit({"plan": _plan(source, Path(request["target"]), params)})
    forward_log(emit, errors)
    lib.llama_backend_init()
    if lib.llama_model_quantize(source, target, ctypes.byref(params)) != 0:
        raise _explained(errors, Path(request["target"]))
    return load_model(request["target"], request["probe"], errors, request["nthread"])


def _parameters(request: Mapping[str, Any]) -> Any:
    params = lib.llama_model_quantize_default_params()
    params.ftype = request["ftype"]
    params.nthread = request["nthread"]
    params.allow_requantize = request["allow_requantize"]
    params.pure = request["pure"]
    params.max_buf_size = _ROW_BUFFER
    for name in ("output_tensor_type", "token_embedding_type"):
        if request[name] is not None:
            setattr(params, name, ggml_type_number(request[name]))
    if request["tensor_types"]:
        params.tt_overrides = _tensor_overrides(request["tensor_types"])
    if request["imatrix"]:
        matrix = read_imatrix(Path(request["imatrix"]))
        params.imatrix = _imatrix_entries(matrix)
        params.kv_overrides = _imatrix_metadata(matrix, Path(request["imatrix"]).name)
    return params


def ggml_type_number(name: str) -> int:
    """Return the number of the ggml type called ``name`` (``q6_K``, ``Q6_K`` …)."""
    return int(getattr(lib, f"GGML_TYPE_{name.upper()}"))


def _tensor_overrides(pairs: list[tuple[str, str]]) -> Any:
    array = (lib.llama_model_tensor_override * (len(pairs) + 1))()
    for slot, (pattern, kind) in zip(array, pairs, strict=False):
        slot.pattern, slot.type = pattern.encode(), ggml_type_number(kind)
    array[len(pairs)].pattern, array[len(pairs)].type = None, lib.GGML_TYPE_COUNT
    _KEEP.append(array)
    return array


def _imatrix_entries(matrix: ImportanceMatrix) -> Any:
    weights = matrix.weights()
    array = (lib.llama_model_imatrix_data * (len(weights) + 1))()
    for slot, (name, values) in zip(array, weights.items(), strict=False):
        slot.name = name.encode()
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        slot.size = values.size
    _KEEP.extend((array, weights))
    return array


def _imatrix_metadata(matrix: ImportanceMatrix, file: str) -> Any:
    """Build the ``quantize.imatrix.*`` keys llama.cpp's own quantize tool writes."""
    keys: list[tuple[str, str | int]] = [("quantize.imatrix.file", file)]
    if matrix.datasets:
        keys.append(("quantize.imatrix.dataset", matrix.datasets[0]))
    keys.append(("quantize.imatrix.entries_count", len(matrix.entries)))
    if matrix.chunk_count > 0:
        keys.append(("quantize.imatrix.chunks_count", matrix.chunk_count))
    array = (lib.llama_model_kv_override * (len(keys) + 1))()
    for slot, (key, value) in zip(array, keys, strict=False):
        slot.key = key.encode()
        if isinstance(value, int):
            slot.tag, slot.value.val_i64 = lib.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            slot.tag, slot.value.val_str = lib.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()[:127]
    _KEEP.append(array)
    return array


def _plan(source: bytes, target: Path, params: Any) -> dict[str, int]:
    """Run llama.cpp's dry run, which takes no work, and refuse what the disk cannot hold."""
    lines: list[str] = []
    errors: list[str] = []
    forward_log(lambda event: lines.append(event["log"]), errors)
    params.dry_run = True
    code = lib.llama_model_quantize(source, b"", ctypes.byref(params))
    params.dry_run = False
    if code != 0:
        raise _explained(errors, target)
    size = re.search(r"quant size\s*=\s*([\d.]+) MiB", "".join(lines))
    needed = int((float(size[1]) + 16) * (1 << 20)) if size else 0
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the quantized file needs {needed / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free",
        )
    return {"bytes": needed}


def _explained(errors: list[str], target: Path) -> Exception:
    """Return the exception that llama.cpp's log describes."""
    cause = errors[-1] if errors else "llama_model_quantize failed and said nothing"
    cause = re.sub(r"^llama_model_quantize: failed to quantize: ", "", cause)
    if "iostream" in cause or "basic_ios" in cause:
        return OSError(
            errno.ENOSPC, f"the disk is full, or a file size limit is reached, while writing {target.name}"
        )
    return RuntimeError(cause)


def safe_model_params() -> Any:
    """Return parameters under which a model loads and runs on every CPU.

    The extra buffer types repack weights: a copy of each, and on an Intel CPU with AMX, where
    gcc 12 compiled llama.cpp for it, code that dies of an illegal instruction
    (https://github.com/ggml-org/llama.cpp/pull/26954).
    """
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False
    return params


def load_model(path: str, probe: str, errors: list[str], threads: int) -> LoadedModel:
    """Load the model at ``path``, tokenize ``probe``, run some of its tokens, and return what came of it.

    A vocabulary that does not fit its tokenizer model makes llama.cpp abort on the
    first unusual byte, and weights may load that compute nothing finite; here that
    happens before anything is published.

    Raises:
        RuntimeError: llama.cpp cannot load or run it; the message is its own.
        ValueError: what it computes is not finite.
    """
    model = lib.llama_model_load_from_file(path.encode(), safe_model_params())
    if not model:
        raise RuntimeError(
            f"llama.cpp cannot load the quantized file: {errors[-1] if errors else 'no cause given'}"
        )
    vocab = lib.llama_model_get_vocab(model)
    description = ctypes.create_string_buffer(128)
    lib.llama_model_desc(model, description, 128)
    template = lib.llama_model_chat_template(model, None)
    tokens = tokenize(vocab, probe.encode(), special=False)
    facts: LoadedModel = {
        "description": description.value.decode("utf-8", "replace"),
        "parameters": int(lib.llama_model_n_params(model)),
        "vocabulary": int(lib.llama_vocab_n_tokens(vocab)),
        "bos": int(lib.llama_vocab_bos(vocab)),
        "eos": int(lib.llama_vocab_eos(vocab)),
        "context_length": int(lib.llama_model_n_ctx_train(model)),
        "chat_template": template is not None,
        "probe_tokens": tokens,
        "probe_text": _detokenize(vocab, tokens),
        "forward_tokens": _run(model, tokens[:_FORWARD_TOKENS] or [0], errors, threads),
    }
    lib.llama_model_free(model)
    return facts


def _run(model: Any, tokens: list[int], errors: list[str], threads: int) -> int:
    """Run ``tokens`` through the model, check what it computes, and return their number."""
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(len(tokens), 32)
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(
            f"llama.cpp loads the quantized file and cannot run it: {errors[-1] if errors else 'no cause given'}"
        )
    step = lib.llama_encode if lib.llama_model_has_encoder(model) else lib.llama_decode
    if step(context, batch_of(tokens)) != 0:
        raise RuntimeError(f"the forward pass failed: {errors[-1] if errors else 'no cause given'}")
    # A decoder gives logits, an encoder the embeddings of its tokens or of the text.
    outputs = (
        (
            lib.llama_get_logits(context),
            len(tokens) * int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))),
        ),
        (lib.llama_get_embeddings_seq(context, 0), int(lib.llama_model_n_embd(model))),
        (lib.llama_get_embeddings(context), len(tokens) * int(lib.llama_model_n_embd(model))),
    )
    found = next(((pointer, count) for pointer, count in outputs if pointer), None)
    if found is not None and not np.isfinite(np.ctypeslib.as_array(found[0], (found[1],))).all():
        raise ValueError("the quantized file loads, and its forward pass gives numbers that are not finite")
    lib.llama_free(context)
    return len(tokens)


def batch_of(tokens: list[int]) -> Any:
    """Return one sequence of ``tokens`` as llama.cpp's batch, logits asked for at every position."""
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position] = token
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        # The last block skips rows whose logits nobody asks for.
        batch.logits[position] = 1
    return batch


def tokenize(vocab: Any, text: bytes, *, special: bool) -> list[int]:
    """Tokenize UTF-8 ``text``; ``special`` adds the model's own BOS and EOS. Empty without a vocabulary."""
    if lib.llama_vocab_type(vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
        return []
    needed = -lib.llama_tokenize(vocab, text, len(text), None, 0, special, False)
    buffer = (lib.llama_token * max(needed, 1))()
    count = lib.llama_tokenize(vocab, text, len(text), buffer, needed, special, False)
    return list(buffer[:count])


def _detokenize(vocab: Any, tokens: list[int]) -> str:
    array, buffer = (
        (lib.llama_token * max(len(tokens), 1))(*tokens),
        ctypes.create_string_buffer(16 * len(tokens) + 64),
    )
    length = lib.llama_detokenize(vocab, array, len(tokens), buffer, len(buffer), False, False)
    return buffer.raw[: max(length, 0)].decode("utf-8", "replace")
