"""llama.cpp by hand: what our path is compared with."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from tests.conftest import converted, first_layers


def quantize_by_hand(source: Path, target: Path, ftype: int, **fields: Any) -> None:
    """Call ``llama_model_quantize`` with its defaults but for ``ftype`` and ``fields``."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    for name, value in fields.items():
        setattr(params, name, value)
    assert (
        llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
    )


def load(model: Path, **settings: Any) -> Any:
    """Load a model without the extra buffer types, whose AMX kernels some compilers break."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def safe() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", safe)
        return llama_cpp.Llama(str(model), verbose=False, **settings)


def logits(model: Path, text: bytes, *, context: int = 256) -> np.ndarray:
    """Return llama.cpp's log-probabilities [tokens, vocabulary] of ``text``."""
    llama = load(model, n_ctx=context, logits_all=True)
    tokens = llama.tokenize(text)[:context]
    llama.eval(tokens)
    scores = np.array(llama.scores[: len(tokens)], np.float64)
    llama.close()
    scores -= scores.max(axis=-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


def greedy(model: Path, prompt: str, count: int) -> str:
    """Return ``count`` greedy tokens after ``prompt``."""
    llama = load(model, n_ctx=256)
    reply: Any = llama.create_completion(prompt, max_tokens=count, temperature=0.0)
    llama.close()
    return str(reply["choices"][0]["text"])


@pytest.fixture(scope="session")
def stories_gguf(stories15m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories15M as the float32 GGUF the converter makes of it, published by ``keep_intermediate``."""
    from qwodel import Quantizer

    folder = tmp_path_factory.mktemp("stories")
    quantizer = Quantizer("gguf", stories15m, folder, keep_intermediate=True)
    quantizer.quantize("Q8_0")
    return Path(quantizer.get_model_info()["intermediate"])


@pytest.fixture(scope="session")
def short_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with its first four layers of thirty, for types that take minutes to find."""
    return first_layers(smollm2, tmp_path_factory.mktemp("short") / smollm2.name, 4)


@pytest.fixture(scope="session")
def short_smollm2_gguf(short_smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as the bfloat16 GGUF llama.cpp's converter makes of it."""
    return converted(short_smollm2, tmp_path_factory.mktemp("short") / f"{short_smollm2.name}-BF16.gguf")
