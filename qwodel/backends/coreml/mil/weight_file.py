"""``weight.bin`` of a Core ML package: 64-byte records, each pointing at the bytes of one array.

Format: coremltools' ``mlmodel/src/MILBlob/Blob/StorageFormat.hpp``, version 2.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from qwodel.exceptions import IntegrityError

__all__ = ["WeightFile", "unpack_bits"]

_SENTINEL = 0xDEADBEEF
_RECORD = struct.Struct("<IIQQQ")  # sentinel, data type, bytes, offset, padding bits


class WeightFile:
    """A memory-mapped ``weight.bin``.

    Raises:
        IntegrityError: the file is shorter than its header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
        if len(self._bytes) < 64:
            raise IntegrityError(f"{path} is truncated: it has no header")

    def read(self, offset: int, needed: int) -> np.ndarray:
        """Return the uint8 bytes of the array whose record is at ``offset``.

        Raises:
            IntegrityError: there is no record, it reaches past the end, or it does not hold ``needed`` bytes.
        """
        record = bytes(self._bytes[offset : offset + _RECORD.size])
        if len(record) < _RECORD.size:
            raise IntegrityError(f"{self.path} is truncated: it has no record at {offset}")
        sentinel, _, size, start, _ = _RECORD.unpack(record)
        if sentinel != _SENTINEL or start + size > len(self._bytes) or size < needed:
            raise IntegrityError(
                f"{self.path} is damaged: the record at {offset} does not hold {needed} bytes"
            )
        return self._bytes[start : start + needed]


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return ``count`` unsigned ``bits``-bit numbers as uint8, least significant bits first."""
    if bits == 8:
        return packed[:count]
    if bits in (1, 2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return ((packed[:, None] >> shifts) & ((1 << bits) - 1)).reshape(-1)[:count]
    flat = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    return np.packbits(flat, axis=1, bitorder="little")[:, 0]
