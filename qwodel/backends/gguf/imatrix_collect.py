"""Compute an importance matrix: squared activations of every matrix product of a forward pass.

Runs in the worker process only. llama.cpp shows each node of its graph to an
evaluation callback; for products with a ``blk.*`` weight the squares of the other
operand are summed per channel, as llama.cpp's ``llama-imatrix`` does. Sums are kept
in float64.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as lib
from llama_cpp._ggml import libggml

from qwodel.backends.gguf.answers import CollectedMatrix
from qwodel.backends.gguf.imatrix import ImatrixEntry, ImportanceMatrix, write_imatrix
from qwodel.backends.gguf.llama import batch_of, forward_log, safe_model_params, tokenize

__all__ = ["collect"]

Emit = Callable[[dict[str, Any]], None]
_MIN_ROWS = 16  # llama-imatrix ignores smaller products


class _Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of ggml.h."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


def _op_numbers() -> tuple[int, int]:
    """Return ggml's numbers of MUL_MAT and MUL_MAT_ID, asked by name."""
    libggml.ggml_op_name.restype = ctypes.c_char_p
    names = {libggml.ggml_op_name(number): number for number in range(60)}
    return names[b"MUL_MAT"], names[b"MUL_MAT_ID"]


class _Collector:
    """Sums of squares by weight name."""

    def __init__(self) -> None:
        self.mul_mat, self.mul_mat_id = _op_numbers()
        self.sums: dict[str, npt.NDArray[np.float64]] = {}
        self.counts: dict[str, npt.NDArray[np.int64]] = {}
        self.error: Exception | None = None

    def __call__(self, pointer: int, ask: bool, _: Any) -> bool:
        if self.error is not None:
            return False
        try:
            node = _Tensor.from_address(pointer)
            if ask:
                return self._wanted(node)
            self._add(node)
        except Exception as error:
            # An exception cannot cross native frames: stop the graph, raise later.
            self.error = error
            return False
        return True

    def _wanted(self, node: _Tensor) -> bool:
        if node.op == self.mul_mat_id:
            return True
        if node.op != self.mul_mat:
            return False
        other = node.src[1].contents
        return (
            bool(other.ne[1] >= _MIN_ROWS)
            and other.type == lib.GGML_TYPE_F32
            and _weight_name(node).startswith("blk.")
        )

    def _add(self, node: _Tensor) -> None:
        name, weight, x = _weight_name(node), node.src[0].contents, _array(node.src[1].contents)
        matrices = int(weight.ne[2] * weight.ne[3])
        sums = self.sums.setdefault(name, np.zeros((matrices, x.shape[-1])))
        if not np.isfinite(x).all():
            raise ValueError(f"the activations into {name} are not finite")
        if node.op == self.mul_mat_id:
            self._add_experts(name, sums, x[0], _ids(node.src[2].contents))
            return
        counts = self.counts.setdefault(name, np.zeros(1, np.int64))
        for outer in range(x.shape[0]):
            for inner in range(x.shape[1]):
                matrix = (outer % int(weight.ne[3])) * int(weight.ne[2]) + inner % int(weight.ne[2])
                rows = x[outer, inner]
                sums[matrix] += np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        counts += x.shape[0] * x.shape[1] * x.shape[2] // matrices

    def _add_experts(
        self, name: str, sums: npt.NDArray[np.float64], x: npt.NDArray[np.float32], ids: npt.NDArray[np.int32]
    ) -> None:
        """``x`` is [tokens, slots or 1, channels], ``ids`` [tokens, slots]."""
        counts = self.counts.setdefault(name, np.zeros(len(sums), np.int64))
        for slot in range(ids.shape[1]):
            rows = x[:, slot % x.shape[1]]
            for expert in np.unique(ids[:, slot]):
                chosen = rows[ids[:, slot] == expert]
                sums[expert] += np.einsum("ij,ij->j", chosen, chosen, dtype=np.float64)
                counts[expert] += len(chosen)


def _weight_name(node: _Tensor) -> str:
    name = bytes(node.src[0].contents.name).decode()
    # A copy on another device is called DEVICE#name#number.
    return name.split("#")[1] if "#" in name else name


def _array(tensor: _Tensor) -> npt.NDArray[np.float32]:
    """View an F32 host tensor as [ne3, ne2, ne1, ne0]."""
    shape = tuple(int(n) for n in reversed(tensor.ne))
    strides = tuple(int(n) for n in reversed(tensor.nb))
    size = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 4
    raw = (ctypes.c_uint8 * size).from_address(tensor.data)
    return np.ndarray(shape, np.float32, memoryview(raw), strides=strides)


def _ids(tensor: _Tensor) -> npt.NDArray[np.int32]:
    """View the expert ids as [tokens, slots]."""
    shape, strides = (int(tensor.ne[1]), int(tensor.ne[0])), (int(tensor.nb[1]), int(tensor.nb[0]))
    size = (shape[0] - 1) * strides[0] + (shape[1] - 1) * strides[1] + 4
    raw = (ctypes.c_uint8 * size).from_address(tensor.data)
    return np.ndarray(shape, np.int32, memoryview(raw), strides=strides)


def collect(request: dict[str, Any], emit: Emit) -> CollectedMatrix:
    """Run the text through the model and write the matrix.

    Request keys: ``model``, ``text`` (a UTF-8 file), ``target``, ``dataset``,
    ``seq_length``, ``num_samples`` (``None`` for all), ``nthread``.
    """
    errors: list[str] = []
    forward_log(emit, errors)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(request["model"].encode(), safe_model_params())
    if not model:
        raise RuntimeError(
            f"llama.cpp cannot load {request['model']}: {errors[-1] if errors else 'no cause given'}"
        )
    length = min(request["seq_length"], int(lib.llama_model_n_ctx_train(model)))
    collector = _Collector()
    callback = lib.ggml_backend_sched_eval_callback(collector)
    context = lib.llama_init_from_model(model, _context_params(length, request["nthread"], callback))
    if not context:
        raise RuntimeError(
            f"llama.cpp cannot make a context of {length} tokens: {errors[-1] if errors else ''}"
        )
    tokens = tokenize(lib.llama_model_get_vocab(model), Path(request["text"]).read_bytes(), special=True)
    chunks = min(len(tokens) // length, request["num_samples"] or len(tokens))
    if chunks == 0:
        raise ValueError(f"the calibration text has {len(tokens)} tokens, and one sample needs {length}")
    for index, chunk in enumerate(_chunks(model, tokens, length, chunks)):
        emit({"chunk": index, "chunks": chunks})
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        if lib.llama_decode(context, batch_of(chunk)) != 0 or collector.error:
            raise collector.error or RuntimeError(f"the forward pass failed: {errors[-1] if errors else ''}")
    emit({"chunk": chunks, "chunks": chunks})
    entries = {
        name: ImatrixEntry(sums.astype(np.float32), collector.counts[name].astype(np.float32))
        for name, sums in collector.sums.items()
    }
    write_imatrix(ImportanceMatrix(entries, (request["dataset"],), chunks, length), Path(request["target"]))
    return {"entries": len(entries), "chunks": chunks, "chunk_size": length, "tokens": chunks * length}


def _context_params(length: int, threads: int, callback: Any) -> Any:
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = length
    params.n_threads = params.n_threads_batch = threads
    params.cb_eval = callback
    return params


def _chunks(model: Any, tokens: list[int], length: int, count: int) -> Iterator[list[int]]:
    """Cut ``tokens`` into samples; each starts with BOS where the model wants one, as llama-imatrix does."""
    vocab = lib.llama_model_get_vocab(model)
    for index in range(count):
        chunk = tokens[index * length : (index + 1) * length]
        if lib.llama_vocab_get_add_bos(vocab):
            chunk[0] = int(lib.llama_vocab_bos(vocab))
        yield chunk
