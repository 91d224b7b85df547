"""Perplexity of a language model on windows of the text of a dataset."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from qwodel.calibration import load_texts
from qwodel.calibration.texts import local_path
from qwodel.exceptions import CalibrationError

__all__ = ["perplexity", "token_windows"]

_KNOWN = {
    "wikitext-2": "wikitext:wikitext-2-raw-v1",
    "wikitext2": "wikitext:wikitext-2-raw-v1",
    "wikitext": "wikitext:wikitext-2-raw-v1",
    "wikitext-103": "wikitext:wikitext-103-raw-v1",
    "wikitext103": "wikitext:wikitext-103-raw-v1",
}
"""Short names of datasets on the hub."""


@torch.no_grad()
def perplexity(model: Any, windows: Iterable[torch.Tensor]) -> float:
    """exp of the mean negative log-likelihood a token, over windows of token ids ``[tokens]``.

    The first token of a window is not predicted.
    """
    total, count = 0.0, 0
    parameter = next(iter((*model.parameters(), *model.buffers())))
    for window in windows:
        ids = window.to(parameter.device)[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").double())
        count += ids.shape[1] - 1
    if not count:
        raise CalibrationError("there is no text to predict")
    return math.exp(total / count)


def token_windows(
    dataset: str | os.PathLike[str] | Sequence[str],
    tokenizer: Any,
    *,
    seq_len: int,
    count: int | None = None,
    token: str | None = None,
) -> list[torch.Tensor]:
    """Cut the test text of a dataset into windows of ``seq_len`` tokens that do not overlap.

    Raises:
        CalibrationError: the text is missing, or too short for a window.
    """
    if isinstance(dataset, str) and local_path(dataset) is None:
        dataset = _KNOWN.get(dataset.casefold(), dataset)
    text = "\n\n".join(load_texts(dataset, split="test", token=token))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = [ids[start : start + seq_len] for start in range(0, len(ids) - seq_len + 1, seq_len)]
    if not windows:
        raise CalibrationError(
            f"the text has {len(ids)} tokens, and a window {seq_len}",
            hint="give more text, or a smaller seq_len",
        )
    return windows[:count]
