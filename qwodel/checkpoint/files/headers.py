"""The headers of all files of a checkpoint, as a value that travels to whoever opens the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwodel.checkpoint.files.pickled import PICKLED, read_pickled_header
from qwodel.exceptions import ValidationError
from qwodel.parsed_files import ParsedFiles
from qwodel.safetensors_files import (
    SafetensorsHeader,
    TensorEntry,
    check_index,
    checkpoint_files,
    find_index,
    read_header,
    read_index,
)
from qwodel.untrusted import kind_of
from qwodel.weight_search import TRAINING_FILES

__all__ = ["CheckpointHeaders"]


@dataclass(frozen=True, slots=True)
class CheckpointHeaders:
    """What the files of a checkpoint say of their tensors.

    Attributes:
        path: the file, or the directory of shards.
        headers: of every file, sorted by the files' names.
    """

    path: Path
    headers: tuple[SafetensorsHeader, ...]

    @classmethod
    def read(cls, path: Path, parsed: ParsedFiles | None = None) -> CheckpointHeaders:
        """Parse them, but for those that are ``parsed`` already.

        Raises:
            ValidationError: there are no weight files, two files hold the
                same tensor, or the index says otherwise than the headers.
            IntegrityError: a file is truncated or damaged.
        """
        safetensors = read_header if parsed is None else parsed.header
        found = cls(
            path,
            tuple(
                read_pickled_header(file) if file.suffix in PICKLED else safetensors(file)
                for file in _weight_files(path)
            ),
        )
        found._check()
        return found

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold weights."""
        return tuple(header.path for header in self.headers)

    def places(self) -> Mapping[str, tuple[SafetensorsHeader, TensorEntry]]:
        """Name → file and place of every tensor, in file order."""
        return {entry.name: (header, entry) for header in self.headers for entry in header}

    def _check(self) -> None:
        held: dict[str, Path] = {}
        for header in self.headers:
            for name in header.tensors:
                if name in held:
                    raise ValidationError(
                        f"tensor {name!r} is in both {held[name].name} and {header.path.name}"
                    )
                held[name] = header.path
        index = find_index(self.path, self.headers[0].path.suffix) if self.path.is_dir() else None
        if index is not None:
            files = {name: file.relative_to(self.path).as_posix() for name, file in held.items()}
            check_index(index, read_index(index), files)


def _weight_files(path: Path) -> list[Path]:
    kind = kind_of(path)
    if kind is None:
        raise ValidationError(f"{path} does not exist")
    if kind == "file":
        return [path]
    files = checkpoint_files(path) or checkpoint_files(path, ".bin")
    if not files:
        raise ValidationError(
            f"{path} has no .safetensors or .bin files", hint="give the directory that holds the weights"
        )
    return [file for file in files if file.name not in TRAINING_FILES]
