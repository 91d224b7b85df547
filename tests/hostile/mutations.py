"""Damage, made from a seed: to bytes, to JSON and to the containers that hold them.

Everything here is deterministic in its :class:`random.Random`, so a failing case is a name and a number.
"""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Sequence
from typing import Any

__all__ = ["damaged_bytes", "damaged_json", "framed", "rezipped", "split_frame"]

_NUMBERS = (0, 1, 2, 7, 31, 32, 64, 127, 128, 255, 256, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
            1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
_RAW = {
    "@big@": "1e400",
    "@long@": "9" * 5000,
    "@nan@": "NaN",
    "@inf@": "-Infinity",
    "@deep@": "[" * 3000 + "]" * 3000,
    "@deepobject@": '{"a":' * 3000 + "1" + "}" * 3000,
    "@half@": '"\\ud800"',
    "@minuszero@": "-0",
}
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 1 << 31, 1 << 62, 1 << 63, 1 << 64, 64.9, -0.5, 1e300, "64", "", ".", "..",
    "../../x", "/dev/zero", "a\0b", "x" * 300, "\u202e\x1b[31m", [], {}, [[]], [None], [True, 64.9], {"a": {}},
    {"": None}, [1 << 62] * 8, "(a+)+$", "(", "F32", "I8", "float32", *_RAW,
)  # fmt: skip


def damaged_bytes(data: bytes, rng: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """Return ``data`` after one to four cuts, flips, overwritten numbers and splices."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _damage(found, rng, others)
    return bytes(found)


def _damage(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    size = len(data)
    # Half of it near the beginning, where headers are.
    place = rng.randrange(max(1, min(size, 300) if rng.random() < 0.5 else size))
    span = rng.choice((1, 2, 4, 8, 16, 100, size // 2))
    kind = rng.randrange(8)
    if kind == 0 and size:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1 and size:
        data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif kind == 2:
        width = rng.choice((1, 2, 4, 8))
        number = rng.choice(_NUMBERS) % (1 << 8 * width)
        data[place : place + width] = number.to_bytes(width, "little")
    elif kind == 3:
        del data[rng.randrange(size + 1) :]
    elif kind == 4:
        del data[place : place + span]
    elif kind == 5:
        data[place:place] = data[place : place + span] * rng.choice((1, 2, 50))
    elif kind == 6:
        data[place:place] = rng.randbytes(span % 64)
    elif others:
        other = rng.choice(others)
        start = rng.randrange(len(other) + 1)
        data[place : place + span] = other[start : start + span]


def damaged_json(document: Any, rng: random.Random) -> bytes:
    """Return JSON text of ``document`` with values swapped for hostile ones, or damaged as text."""
    found = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = _swapped(found, rng)
    text = json.dumps(found)
    for name, literal in _RAW.items():
        text = text.replace(f'"{name}"', literal)
    raw = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        raw = raw.replace(b"{", b'{"twice":1,"twice":2,', 1)
    if rng.random() < 0.05:
        raw = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe")) + raw
    return damaged_bytes(raw, rng) if rng.random() < 0.15 else raw


def _swapped(document: Any, rng: random.Random) -> Any:
    places = list(_places(document))
    if not places or rng.random() < 0.02:
        return rng.choice(_VALUES)
    holder, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.7:
        holder[key] = copy.deepcopy(rng.choice(_VALUES))
    elif kind < 0.8:
        del holder[key]
    elif kind < 0.9:
        other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif isinstance(holder, dict):
        holder[str(rng.choice(_VALUES))[:300]] = holder.pop(key)
    else:
        holder *= rng.choice((0, 2, 40))
    return document


def _places(document: Any) -> Any:
    left = [document]
    while left:
        holder = left.pop()
        keys = (
            list(holder)
            if isinstance(holder, dict)
            else range(len(holder))
            if isinstance(holder, list)
            else ()
        )
        for key in keys:
            yield holder, key
            left.append(holder[key])


def framed(header: bytes, data: bytes) -> bytes:
    """Return a safetensors file of a header and its data."""
    return struct.pack("<Q", len(header)) + header + data


def split_frame(raw: bytes) -> tuple[Any, bytes]:
    """Return header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rezipped(raw: bytes, changed: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive with some members replaced, whole and with the right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as before, zipfile.ZipFile(buffer, "w", compression) as after:
        for name in before.namelist():
            new = next((data for ending, data in changed.items() if name.endswith(ending)), None)
            after.writestr(name, before.read(name) if new is None else new)
    return buffer.getvalue()
