"""Headers and configurations as they were parsed, for whoever in a run looks at the same files next."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from qwodel.hashes import FileState
from qwodel.model_config import read_config
from qwodel.safetensors_files import SafetensorsHeader, read_header

__all__ = ["ParsedFiles"]

ParsedT = TypeVar("ParsedT")


class ParsedFiles:
    """Parses a file once, and again only where it has been written to or replaced since."""

    def __init__(self) -> None:
        self._headers: dict[Path, tuple[FileState | None, SafetensorsHeader]] = {}
        self._configs: dict[Path, tuple[FileState | None, dict[str, Any]]] = {}

    def header(self, file: Path) -> SafetensorsHeader:
        """The header of a safetensors file.

        Raises:
            as :func:`~qwodel.safetensors_files.read_header`.
        """
        return _kept(self._headers, file, file, read_header)

    def config(self, folder: Path) -> dict[str, Any]:
        """A copy of ``folder/config.json``; empty where there is none.

        Raises:
            as :func:`~qwodel.model_config.read_config`.
        """
        # Other libraries' configuration classes change what they are given.
        return deepcopy(_kept(self._configs, folder, folder / "config.json", read_config))


def _kept(
    kept: dict[Path, tuple[FileState | None, ParsedT]], key: Path, file: Path, read: Callable[[Path], ParsedT]
) -> ParsedT:
    state = _state(file)
    known = kept.get(key)
    if known is None or state is None or known[0] != state:
        # The state comes first: what is written to the file meanwhile shows the next time.
        known = kept[key] = (state, read(key))
    return known[1]


def _state(file: Path) -> FileState | None:
    try:
        return FileState.of(file)
    except OSError:
        return None
