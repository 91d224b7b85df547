"""Documents of a calibration set, one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from qwodel.calibration.hub_sets import hub_records
from qwodel.calibration.records import (
    CalibrationSpec,
    Chat,
    Document,
    describe_dataset,
    documents_of,
    documents_of_iterable,
)
from qwodel.exceptions import CalibrationError, DependencyError
from qwodel.untrusted import (
    checked_path,
    foreign_errors,
    kind_of,
    open_regular,
    parse_json,
    read_json,
    read_regular,
)

__all__ = ["DEFAULT_DATASET", "calibration_files", "load_documents", "load_texts", "local_path"]

DEFAULT_DATASET = "wikitext:wikitext-2-raw-v1"
"""``repo:subset`` of the default calibration set; its split is ``train``."""

_MAX_FILE = 1 << 32
_MAX_LINE = 1 << 26
_ROWS = 256  # of a .parquet file at a time
_FREE_BYTES = 1 << 28
_MAX_RATIO = 100
_SUFFIXES = (".txt", ".raw", ".tokens", ".md", ".json", ".jsonl", ".parquet")


def load_texts(
    spec: CalibrationSpec, *, split: str = "train", token: str | None = None, column: str | None = None
) -> Iterator[str]:
    """Yield the non-empty documents of a calibration set as text; conversations a line a message.

    Args:
        spec: a ``.txt``, ``.json``, ``.jsonl`` or ``.parquet`` file, a directory of
            such files, ``repo`` or ``repo:subset`` on the hub, or an iterable of strings.
        split: which split of a hub dataset.
        token: Hugging Face token for a gated or private dataset.
        column: the text column; found by name where ``None``.

    Raises:
        CalibrationError: the set is missing, unreadable, or holds no text.
    """
    return map(_text, load_documents(spec, split=split, token=token, column=column))


def load_documents(
    spec: CalibrationSpec,
    *,
    split: str = "train",
    token: str | None = None,
    column: str | None = None,
    revision: str | None = None,
) -> Iterator[Document]:
    """Yield the non-empty documents of a set as they are: text, conversation or token ids.

    The arguments are :func:`load_texts`'s; ``revision`` pins a hub dataset's commit.

    Raises:
        CalibrationError: the set is missing, unreadable, or holds no text.
    """
    path = local_path(spec)
    if path is not None:
        documents = _local(path, column)
    elif isinstance(spec, str | os.PathLike):
        documents = _remote(os.fspath(spec), split, token, column, revision)
    else:
        documents = documents_of_iterable(spec, column)
    first = next(documents, None)
    if first is None:
        raise CalibrationError(f"the calibration set {describe_dataset(spec)} holds no text")
    return chain([first], documents)


def local_path(spec: CalibrationSpec) -> Path | None:
    """Return the file or directory ``spec`` names, or ``None`` where it names none that exists.

    Raises:
        CalibrationError: it cannot be a path, or something else is there, such as a pipe.
    """
    if not isinstance(spec, str | os.PathLike):
        return None
    path = checked_path(spec, error=CalibrationError)
    return path if kind_of(path, error=CalibrationError) else None


def calibration_files(path: Path) -> list[Path]:
    """Return the calibration files of a directory, sorted; a file is itself.

    Raises:
        CalibrationError: the directory holds none.
    """
    if kind_of(path, error=CalibrationError) != "directory":
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in _SUFFIXES and kind_of(file, error=CalibrationError) == "file"
    )
    if not files:
        raise CalibrationError(
            f"{path} holds no calibration files", hint=f"known endings: {', '.join(_SUFFIXES)}"
        )
    return files


def _text(document: Document) -> str:
    if isinstance(document, list):
        raise CalibrationError("calibration texts must be strings; found list of token ids")
    return document.text if isinstance(document, Chat) else document


def _local(path: Path, column: str | None) -> Iterator[Document]:
    return chain.from_iterable(_file(file, column) for file in calibration_files(path))


def _file(path: Path, column: str | None) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                record = parse_json(line, f"{path}, line {number}", constants=True, error=CalibrationError)
                yield from documents_of(record, column, str(path))
    elif suffix == ".json":
        document = read_json(path, limit=_MAX_FILE, constants=True, error=CalibrationError)
        for record in document if isinstance(document, list) else [document]:
            yield from documents_of(record, column, str(path))
    elif suffix == ".parquet":
        yield from _parquet(path, column)
    elif suffix in _SUFFIXES:
        yield from _plain(path)
    else:
        raise CalibrationError(
            f"{path} is no calibration file this library knows",
            hint=f"known endings: {', '.join(_SUFFIXES)}",
        )


def _lines(path: Path) -> Iterator[bytes]:
    with open_regular(path, error=CalibrationError) as file:
        while line := _read_line(file, path):
            yield line


def _read_line(file: BinaryIO, path: Path) -> bytes:
    try:
        line = file.readline(_MAX_LINE + 1)
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
    if len(line) > _MAX_LINE:
        raise CalibrationError(
            f"{path} has a line of more than {_MAX_LINE:,} bytes", hint="give a document a line"
        )
    return line


def _plain(path: Path) -> Iterator[str]:
    try:
        text = read_regular(path, limit=_MAX_FILE, error=CalibrationError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} cannot be read as UTF-8 text: {error.reason} at byte {error.start:,}",
            hint="save it as UTF-8",
        ) from error
    if text.strip():
        yield text


def _parquet(path: Path, column: str | None) -> Iterator[Document]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DependencyError("reading .parquet needs pyarrow", hint="pip install pyarrow") from error
    with open_regular(path, error=CalibrationError) as file:
        records = _parquet_records(parquet, file, path)
        while True:
            with foreign_errors(f"{path} cannot be read", error=CalibrationError):
                record = next(records, None)
            if record is None:
                return
            yield from documents_of(record, column, str(path))


def _parquet_records(parquet: Any, file: BinaryIO, path: Path) -> Iterator[dict[str, Any]]:
    size = os.fstat(file.fileno()).st_size
    source = parquet.ParquetFile(file)
    groups = range(source.metadata.num_row_groups)
    unpacked = sum(source.metadata.row_group(group).total_byte_size for group in groups)
    if unpacked > _FREE_BYTES + _MAX_RATIO * size:
        raise CalibrationError(f"{path} of {size:,} bytes would become {unpacked:,}")
    # Small batches: a dictionary may repeat one long text in all rows.
    for batch in source.iter_batches(_ROWS):
        yield from batch.to_pylist()


def _remote(
    spec: str, split: str, token: str | None, column: str | None, revision: str | None
) -> Iterator[Document]:
    if spec.endswith(_SUFFIXES) or spec.startswith((".", "/", "~")):
        raise CalibrationError(f"the calibration file {spec} does not exist")
    for record in hub_records(spec, split, token, revision):
        yield from documents_of(record, column, spec)
