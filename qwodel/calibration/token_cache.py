"""Tokenized calibration sets, kept by the hash of what they were made from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

__all__ = ["TokenCache"]

_log = logging.getLogger("qwodel.calibration")


class TokenCache:
    """Token arrays in a folder. A cache that cannot be written is only slower."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, source: str | None, tokenizer: Any, settings: tuple[Any, ...]) -> str | None:
        """Return the name of an entry; ``None`` where source or tokenizer cannot be identified."""
        fingerprint = _tokenizer_fingerprint(tokenizer)
        if source is None or fingerprint is None:
            return None
        return hashlib.sha256(json.dumps([source, fingerprint, *settings]).encode()).hexdigest()[:32]

    def load(self, key: str | None, shape: tuple[int, int]) -> npt.NDArray[np.int64] | None:
        """Return an entry of this shape, or ``None``; a damaged one counts as none."""
        if key is None:
            return None
        try:
            array = np.load(self.folder / f"{key}.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return array if array.shape == shape and array.dtype == np.int64 else None

    def store(self, key: str | None, tokens: npt.NDArray[np.int64]) -> None:
        """Keep an entry."""
        if key is not None:
            self._write(f"{key}.npy", lambda file: np.save(file, tokens))

    def note_revision(self, dataset: str, revision: str) -> None:
        """Remember the commit the hub gave for a dataset."""
        if self.last_revision(dataset) != revision:
            self._write(_revision_name(dataset), lambda file: file.write(revision.encode("ascii")))

    def last_revision(self, dataset: str) -> str | None:
        """Return the commit last noted for a dataset."""
        try:
            return (self.folder / _revision_name(dataset)).read_text("ascii") or None
        except (OSError, UnicodeDecodeError):
            return None

    def _write(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        aside = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, aside = tempfile.mkstemp(dir=self.folder, prefix=".")
            with os.fdopen(descriptor, "wb") as file:
                write(file)
            Path(aside).replace(self.folder / name)
        except OSError as error:
            _log.info("the calibration cache %s cannot be written: %s", self.folder, error)
            if aside is not None:
                Path(aside).unlink(missing_ok=True)


def _revision_name(dataset: str) -> str:
    return f"{hashlib.sha256(dataset.encode()).hexdigest()[:32]}.revision"


def _tokenizer_fingerprint(tokenizer: Any) -> str | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    special = [getattr(tokenizer, "chat_template", None), getattr(tokenizer, "eos_token_id", None)]
    return hashlib.sha256(f"{backend.to_str()}{json.dumps(special)}".encode()).hexdigest()
