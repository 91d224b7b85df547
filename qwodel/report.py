"""Manifests: one envelope for every backend and tool, and one way to write JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qwodel.version import __version__

__all__ = [
    "SCHEMA",
    "TensorQuality",
    "decibels",
    "envelope",
    "finite_db",
    "json_safe",
    "json_text",
    "source_facts",
    "versions_of",
]

SCHEMA = 1
"""Version of the envelope; it grows when a key changes its meaning or goes away."""

# What JSON lets stand and terminals should not get: C1 controls, changes of direction, no width; and lone
# surrogates, which UTF-8 does not have and which are how the file system gives names that are no UTF-8.
_ESCAPED = re.compile("[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def decibels(signal: float, noise: float) -> float:
    """10·log₁₀(signal / noise) of two energies, in dB.

    No noise gives ``inf``, even beside no signal; noise without a signal, or that is not finite, gives ``-inf``.
    """
    if noise == 0:
        return math.inf
    if signal == 0 or not math.isfinite(noise):
        return -math.inf
    return 10 * math.log10(signal / noise)


def finite_db(value: float) -> float | None:
    """The value with two decimals; ``None`` where it is infinite, as of a weight of zeros: JSON has no such number."""
    return round(value, 2) if math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class TensorQuality:
    """How well one saved tensor stands for its source.

    Attributes:
        name: the tensor, or its layer.
        sqnr_db: 10·log₁₀(‖W‖²/‖W−Ŵ‖²); see :func:`decibels`.
        mse: mean of (W−Ŵ)².
        max_error: the largest |W−Ŵ|, where it was looked for.
        output_sqnr_db: the same ratio of the layer's outputs on known inputs, where there are any.
        format: number type and kind of scale, where they are not the same for all.
        rounding: the method that chose its codes.
    """

    name: str
    sqnr_db: float
    mse: float
    max_error: float | None = None
    output_sqnr_db: float | None = None
    format: str = ""
    rounding: str = ""

    @property
    def judged_by(self) -> float:
        """The number that counts, in dB: of the outputs where it is known, else of the weight."""
        return self.sqnr_db if self.output_sqnr_db is None else self.output_sqnr_db

    @property
    def reported_db(self) -> float | None:
        """The weight's SQNR as manifests have it; see :func:`finite_db`."""
        return finite_db(self.sqnr_db)


def envelope(
    *,
    backend: str,
    format: str,  # noqa: A002 - the key's name
    source: Mapping[str, Any],
    recipe: Mapping[str, Any],
    packages: Iterable[str] = (),
    seconds: float | None = None,
    report: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a manifest: what every one has, then what this run reports.

    ``output`` and ``outputs``, each file with bytes and hash, are filled in when the files are published.

    Args:
        backend: the backend, or the tool where there is none.
        format: what was made.
        source: what was given, ``sha256`` of its files with it.
        recipe: every option with the value that was used.
        packages: distributions that did the work.
        seconds: wall time.
        report: the backend's own keys, which the envelope's win over.
    """
    head = {
        "schema": SCHEMA,
        "qwodel": __version__,
        "backend": backend,
        "format": format,
        "source": source,
        "recipe": recipe,
        "output": {},
        "outputs": {},
        "versions": versions_of(packages),
    }
    if seconds is not None:
        head["seconds"] = round(seconds, 3)
    return {**head, **{key: value for key, value in (report or {}).items() if key not in head}}


def source_facts(path: Path, sha256: Mapping[str, str]) -> dict[str, Any]:
    """What an envelope says of a source that is a local file or directory, with the hashes of its weight files."""
    return {"name": path.resolve().name, "path": str(path), "sha256": dict(sha256)}


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of the distributions that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def json_safe(value: Any) -> Any:
    """Return ``value`` as JSON has it, by its type.

    Numbers that are not finite become ``None``; paths, enumerations and anything unknown become
    text; arrays' and tensors' scalars become numbers; data classes become objects.
    """
    if value is None or (isinstance(value, bool | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return json_safe(value.value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_safe(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [json_safe(each) for each in value]
    if isinstance(value, Set):
        return sorted((json_safe(each) for each in value), key=str)
    if is_dataclass(value) and not isinstance(value, type):
        # What a class does not show of itself, such as a token, is nobody else's either.
        return {each.name: json_safe(getattr(value, each.name)) for each in fields(value) if each.repr}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(getattr(value, "item", None)) and getattr(value, "shape", None) == ():
        return json_safe(value.item())
    return str(value)


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """Return strict JSON of anything: no ``NaN``, no ``Infinity``, and text that UTF-8 holds and terminals bear."""
    text = json.dumps(json_safe(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
