"""Documents of a calibration set, one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

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

__all__ = ["DEFAULT_DATASET", "calibration_files", "load_documents", "load_texts", "local_path"]

DEFAULT_DATASET = "wikitext:wikitext-2-raw-v1"
"""``repo:subset`` of the default calibration set; its split is ``train``."""

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
    """Return the file or directory ``spec`` names, or ``None`` where it names none that exists."""
    if not isinstance(spec, str | os.PathLike):
        return None
    path = Path(spec).expanduser()
    return path if path.exists() else None


def calibration_files(path: Path) -> list[Path]:
    """Return the calibration files of a directory, sorted; a file is itself.

    Raises:
        CalibrationError: the directory holds none.
    """
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
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
    try:
        if suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield from documents_of(_parse(line, f"{path}, line {number}"), column, str(path))
        elif suffix == ".json":
            document = _parse(path.read_text("utf-8"), str(path))
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
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error


def _plain(path: Path) -> Iterator[str]:
    text = path.read_text("utf-8")
    if text.strip():
        yield text


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CalibrationError(f"{where} is not JSON: {error}") from error


def _parquet(path: Path, column: str | None) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DependencyError("reading .parquet needs pyarrow", hint="pip install pyarrow") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                yield from documents_of(record, column, str(path))
    except ArrowException as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error


def _remote(
    spec: str, split: str, token: str | None, column: str | None, revision: str | None
) -> Iterator[Document]:
    if spec.endswith(_SUFFIXES) or spec.startswith((".", "/", "~")):
        raise CalibrationError(f"the calibration file {spec} does not exist")
    for record in hub_records(spec, split, token, revision):
        yield from documents_of(record, column, spec)
