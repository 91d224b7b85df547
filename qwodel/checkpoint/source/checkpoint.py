"""A checkpoint that has been looked through once: what all of a run knows of its source, and of its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwodel.checkpoint.files.headers import CheckpointHeaders
from qwodel.checkpoint.files.model_directory import ModelDirectory
from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.source.dequantize_sources import resolve_sources
from qwodel.checkpoint.source.source_tensor import Sources
from qwodel.model_config import read_config
from qwodel.parsed_files import ParsedFiles
from qwodel.untrusted import kind_of

__all__ = ["Checkpoint"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Headers, configuration and weights of a checkpoint; no numbers.

    Attributes:
        headers: what its files say of their tensors.
        directory: what lies beside them.
        sources: which stored tensors make up which weight.
    """

    headers: CheckpointHeaders
    directory: ModelDirectory
    sources: Sources

    @classmethod
    def of(
        cls,
        path: Path | CheckpointHeaders,
        parsed: ParsedFiles | None = None,
        *,
        directory: ModelDirectory | None = None,
    ) -> Checkpoint:
        """Look through a file or a directory, or what its headers were found to say, and what is beside it.

        Only headers are read, besides scalar marks.

        Args:
            parsed: what was parsed before is taken from there.
            directory: what lies beside it, where that is known.

        Raises:
            ValidationError: it is no checkpoint, or is quantized in a way that is not understood.
            IntegrityError: a file is damaged.
        """
        place = path.path if isinstance(path, CheckpointHeaders) else path
        directory = directory or ModelDirectory.of(place, parsed)
        headers = path if isinstance(path, CheckpointHeaders) else CheckpointHeaders.read(path, parsed)
        with UnifiedSafetensorsLoader(headers, low_memory=True) as reader:
            return cls(headers, directory, resolve_sources(reader, directory.config))

    @classmethod
    def alone(cls, path: Path | CheckpointHeaders) -> Checkpoint:
        """:meth:`of`, but a single file speaks for itself: no ``config.json`` beside it is looked at."""
        place = path.path if isinstance(path, CheckpointHeaders) else path
        if kind_of(place) == "directory":
            return cls.of(path, directory=ModelDirectory(place, read_config(place)))
        return cls.of(path, directory=ModelDirectory(None, None))

    @property
    def path(self) -> Path:
        """The file or the directory."""
        return self.headers.path

    @property
    def config(self) -> Mapping[str, Any]:
        """Its ``config.json``; empty where there is none."""
        return self.directory.config or {}

    def open(self) -> UnifiedSafetensorsLoader:
        """Its files, to be read by range."""
        return UnifiedSafetensorsLoader(self.headers, low_memory=True)
