"""Calibration data: a local file, a directory, an iterable or a dataset on the hub → texts, or tokens.

:func:`load_texts` yields documents one at a time. :func:`load_tokens` tokenizes them and packs
them into sequences without padding. Neither holds a large set whole, and the hub is read as a
stream.
"""

from __future__ import annotations

from qwodel.calibration.records import CalibrationSpec, describe_dataset, holds_token_ids
from qwodel.calibration.texts import DEFAULT_DATASET, load_texts
from qwodel.calibration.tokens import Tokenizer, load_tokens

__all__ = [
    "DEFAULT_DATASET",
    "CalibrationSpec",
    "Tokenizer",
    "describe_dataset",
    "holds_token_ids",
    "load_texts",
    "load_tokens",
]
