"""Perplexity of a model as it is, smoothed, and with W8A8 arithmetic simulated."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from qwodel.evaluation.perplexity import perplexity, token_windows
from qwodel.exceptions import ConfigurationError
from qwodel.modeling.fold import remember_weights
from qwodel.modeling.wiring import find_pairs
from qwodel.smoothquant.calibration import tokenizer_of
from qwodel.smoothquant.observe import ActivationStatistics
from qwodel.smoothquant.scheme import Scheme
from qwodel.smoothquant.simulate import fake_quantized
from qwodel.smoothquant.smooth import Alpha, smooth_model

__all__ = ["evaluate_ppl"]


def evaluate_ppl(
    model: nn.Module,
    dataset: str,
    scales: Mapping[str, torch.Tensor] | ActivationStatistics | None,
    alpha: Alpha = 0.5,
    smooth: bool = True,
    quantize: bool = True,
    *,
    tokenizer: Any = None,
    seq_len: int = 2048,
    num_samples: int | None = None,
    scheme: Scheme | None = None,
    n_bits: int = 8,
    inner_alpha: Alpha | None = None,
    token: str | None = None,
) -> float:
    """Return the perplexity of a model on the test text of a dataset; the model is as before afterwards.

    Args:
        model: a transformers language model.
        dataset: ``wikitext-2``, ``wikitext-103``, ``repo:subset`` on the hub, or a file.
        scales: activation scales; needed for smoothing only.
        alpha: smoothing factor, or ``"search"``.
        smooth: smooth the model first.
        quantize: simulate W8A8 arithmetic.
        tokenizer: that of the directory the model was loaded from where ``None``.
        seq_len: tokens a window; windows do not overlap. Cut to the model's context.
        num_samples: windows at most.
        scheme, n_bits: of the simulated arithmetic; a scale a channel and a token where ``None``.
        inner_alpha: see :func:`~qwodel.smoothquant.smooth.smooth_model`.
        token: Hugging Face token for a gated dataset.

    Raises:
        CalibrationError: the text is missing or too short, or ``scales not found for layer …``.
        ConfigurationError: no tokenizer; smoothing without scales.
        ValidationError: ``unsupported model architecture …``.
    """
    if smooth and scales is None:
        raise ConfigurationError("smoothing needs activation scales", hint="pass scales, or smooth=False")
    windows = token_windows(
        dataset,
        tokenizer or tokenizer_of(model),
        seq_len=_window(model, seq_len),
        count=num_samples,
        token=token,
    )
    restore = None
    if smooth and scales is not None:
        pairs = find_pairs(model)
        restore = remember_weights(model, pairs)
        smooth_model(model, scales, alpha, inner_alpha=inner_alpha, scheme=scheme, pairs=pairs)
    try:
        with fake_quantized(model, scheme, n_bits=n_bits) if quantize else nullcontext():
            return perplexity(model, windows)
    finally:
        if restore:
            restore()


def _window(model: nn.Module, wanted: int) -> int:
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions"):
        known = getattr(config, name, None)
        if isinstance(known, int) and known > 0:
            return min(wanted, known)
    return wanted
