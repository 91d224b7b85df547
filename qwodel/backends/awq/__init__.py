"""The AWQ backend: llm-compressor."""

from __future__ import annotations

from qwodel.backends.awq.adapter import AWQQuantizer

__all__ = ["AWQQuantizer"]
