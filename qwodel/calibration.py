"""Calibration text: a local file, a directory, an iterable, or a dataset on the hub.

:func:`load_texts` yields documents one at a time, so a large set is never held whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from qwodel.exceptions import CalibrationError, DependencyError

__all__ = ["DEFAULT_DATASET", "CalibrationSpec", "describe_dataset", "load_texts"]

DEFAULT_DATASET = "wikitext:wikitext-2-raw-v1"
"""``repo:subset`` of the default calibration set; its split is ``train``."""

CalibrationSpec = str | os.PathLike[str] | Iterable[str]
"""A path, a hub dataset (``repo`` or ``repo:subset``), or an iterable of documents."""

_TEXT_COLUMNS = (
    "text",
    "content",
    "document",
    "story",
    "article",
    "prompt",
    "completion",
    "instruction",
    "output",
)
_SUFFIXES = (".txt", ".raw", ".tokens", ".md", ".json", ".jsonl", ".parquet")


def describe_dataset(spec: CalibrationSpec) -> str:
    """Return a short name for ``spec`` that reveals no folder."""
    if isinstance(spec, str | os.PathLike):
        text = os.fspath(spec)
        return Path(text).name if Path(text).exists() else text
    return "texts given in Python"


def load_texts(
    spec: CalibrationSpec, *, split: str = "train", token: str | None = None, column: str | None = None
) -> Iterator[str]:
    """Yield the non-empty documents of a calibration set.

    Args:
        spec: a ``.txt``, ``.json``, ``.jsonl`` or ``.parquet`` file, a directory of
            such files, ``repo`` or ``repo:subset`` on the hub, or an iterable of strings.
        split: which split of a hub dataset.
        token: Hugging Face token for a gated or private dataset.
        column: the text column; found by name where ``None``.

    Raises:
        CalibrationError: the set is missing, unreadable, or holds no text.
    """
    if isinstance(spec, str | os.PathLike):
        path = Path(spec).expanduser()
        texts = _local(path, column) if path.exists() else _remote(os.fspath(spec), split, token, column)
    else:
        texts = _iterable(spec)
    first = next(texts, None)
    if first is None:
        raise CalibrationError(f"the calibration set {describe_dataset(spec)} holds no text")
    return chain([first], texts)


def _iterable(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if not isinstance(text, str):
            raise CalibrationError(f"calibration texts must be strings; found {type(text).__name__}")
        if text.strip():
            yield text


def _local(path: Path, column: str | None) -> Iterator[str]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
        if not files:
            raise CalibrationError(
                f"{path} holds no calibration files", hint=f"known endings: {', '.join(_SUFFIXES)}"
            )
        return chain.from_iterable(_file(file, column) for file in files)
    return _file(path, column)


def _file(path: Path, column: str | None) -> Iterator[str]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield from _record(_parse(line, f"{path}, line {number}"), column, str(path))
        elif suffix == ".json":
            document = _parse(path.read_text("utf-8"), str(path))
            for record in document if isinstance(document, list) else [document]:
                yield from _record(record, column, str(path))
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


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DependencyError("reading .parquet needs pyarrow", hint="pip install pyarrow") from error
    for batch in parquet.ParquetFile(path).iter_batches():
        for record in batch.to_pylist():
            yield from _record(record, column, str(path))


def _record(record: Any, column: str | None, where: str) -> Iterator[str]:
    """Yield the text of one record: a string, a mapping with a text column, or chat messages."""
    if isinstance(record, Mapping):
        if column is None and isinstance(record.get("messages"), list):
            record = "\n".join(str(message.get("content", "")) for message in record["messages"])
        else:
            record = record[_column(record, column, where)]
    if not isinstance(record, str):
        raise CalibrationError(f"{where}: a record's text is {type(record).__name__}, not a string")
    if record.strip():
        yield record


def _column(record: Mapping[str, Any], column: str | None, where: str) -> str:
    candidates = (column,) if column else _TEXT_COLUMNS
    for name in candidates:
        if name in record:
            return name
    raise CalibrationError(
        f"{where} has no text column {' or '.join(map(repr, candidates[:3]))}",
        hint=f"its columns: {', '.join(map(str, record))}; name one",
    )


def _remote(spec: str, split: str, token: str | None, column: str | None) -> Iterator[str]:
    if spec.endswith(_SUFFIXES) or spec.startswith((".", "/", "~")):
        raise CalibrationError(f"the calibration file {spec} does not exist")
    try:
        import datasets
    except ImportError as error:
        raise DependencyError(
            "calibration sets on the hub need the datasets package", hint="pip install datasets"
        ) from error
    repo, _, subset = spec.partition(":")
    try:
        rows = datasets.load_dataset(repo, subset or None, split=split, token=token, streaming=True)
        for record in rows:
            yield from _record(record, column, spec)
    except CalibrationError:
        raise
    except Exception as error:
        # The datasets library raises whatever its many readers raise; the cause is in the text.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CalibrationError(
            f"the calibration set {spec} cannot be read from the hub: {reason}",
            hint="offline, give a local .txt, .json, .jsonl or .parquet file instead; for a gated set pass token=…",
        ) from error
