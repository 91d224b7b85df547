"""The text a model is calibrated on: which, and cut into batches of its tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qwodel.calibration import holds_token_ids, load_tokens
from qwodel.calibration.options import CalibrationOptions
from qwodel.exceptions import DependencyError, ValidationError
from qwodel.extras import install_hint

__all__ = ["CalibrationOptions", "calibration_batches", "load_tokenizer"]

log = logging.getLogger(__name__)

_LEAST_TOKENS = 16384
_TOKENS_A_COLUMN = 2  # twice as many inputs as channels: fewer, and the Gram matrix is mostly noise


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        DependencyError: transformers is not installed.
        ValidationError: there is no tokenizer, or none that loads.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DependencyError(
            "reading calibration text needs transformers", hint=install_hint("calibrate")
        ) from error
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Tokenizers fail in many ways; the text says which.
        raise ValidationError(
            f"{folder} has no tokenizer that loads: {error}",
            hint="put tokenizer.json beside the weights, or give calibration data as lists of token ids",
        ) from error


def calibration_batches(
    folder: Path, config: Any, options: CalibrationOptions, widest: int
) -> Iterator[Mapping[str, Any]]:
    """Keyword arguments of a transformers model's forward pass, batch by batch.

    Args:
        folder: the model directory, for its tokenizer.
        config: the model's configuration.
        options: the text.
        widest: input channels of the widest layer.

    Raises:
        CalibrationError: the text is missing or too little.
        ValidationError: there is no tokenizer.
    """
    text = getattr(config, "get_text_config", lambda: config)()
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    length = min(options.seq_length, context) if isinstance(context, int) else options.seq_length
    wanted = max(_LEAST_TOKENS, _TOKENS_A_COLUMN * widest)
    tokens = load_tokens(
        options.dataset,
        None if holds_token_ids(options.dataset) else load_tokenizer(folder),
        num_samples=options.num_samples or -(-wanted // length),
        seq_length=options.seq_length,
        seed=options.seed,
        split=options.split,
        token=options.token,
        column=options.column,
        context_length=context if isinstance(context, int) else None,
    )
    log.info("calibrating on %d sequences of %d tokens", *tokens.shape)
    for start in range(0, len(tokens), options.batch_size):
        ids = torch.from_numpy(tokens[start : start + options.batch_size]).to(options.device)
        batch: dict[str, Any] = {"input_ids": ids}
        if getattr(config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = ids
        if hasattr(text, "use_cache"):
            batch["use_cache"] = False
        yield batch
