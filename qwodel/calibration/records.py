"""What one record of a calibration set holds: text, a conversation or tokens."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from qwodel.exceptions import CalibrationError

__all__ = [
    "CalibrationSpec",
    "Chat",
    "Document",
    "describe_dataset",
    "documents_of",
    "documents_of_iterable",
    "holds_token_ids",
    "token_ids",
]

CalibrationSpec = str | os.PathLike[str] | Iterable[Any]
"""A path, a hub dataset (``repo`` or ``repo:subset``), or an iterable of documents:
strings, records with a text column, conversations (lists of messages) or lists of token ids."""

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
_MAX_TOKEN = 1 << 31
_CHAT_COLUMNS = ("messages", "conversations", "conversation")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation: ``{"role": …, "content": …}`` each."""

    messages: tuple[dict[str, str], ...]

    @property
    def text(self) -> str:
        """The contents alone, a line each, for readers without a chat template."""
        return "\n".join(message["content"] for message in self.messages)


Document: TypeAlias = str | Chat | list[int]


def describe_dataset(spec: CalibrationSpec) -> str:
    """Return a short name for ``spec`` that reveals no folder."""
    if isinstance(spec, str | os.PathLike):
        text = os.fspath(spec)
        try:
            return Path(text).name if Path(text).exists() else text
        except OSError:  # a name that is too long for a path
            return text
    return "texts given in Python"


def documents_of_iterable(items: Iterable[Any], column: str | None) -> Iterator[Document]:
    """Yield the documents of an iterable given in Python.

    Raises:
        CalibrationError: an item is none of the kinds :data:`CalibrationSpec` names.
    """
    for item in items:
        tokens = token_ids(item)
        if tokens is not None:
            if tokens and not (min(tokens) >= 0 and max(tokens) < _MAX_TOKEN):
                raise CalibrationError(f"token ids lie between 0 and {_MAX_TOKEN:,}")
            if tokens:
                yield tokens
        elif isinstance(item, str | Mapping) or _is_chat(item):
            yield from documents_of(item, column, describe_dataset(items))
        else:
            raise CalibrationError(
                f"calibration texts must be strings; found {type(item).__name__}",
                hint="give strings, records with a text column, conversations or lists of token ids",
            )


def documents_of(record: Any, column: str | None, where: str) -> Iterator[Document]:
    """Yield the document of one record of a file or dataset, if it is not empty.

    Raises:
        CalibrationError: the record has no text column, or holds something else there.
    """
    if isinstance(record, Mapping):
        chat = None if column else next((name for name in _CHAT_COLUMNS if _is_chat(record.get(name))), None)
        record = record[chat or _column(record, column, where)]
    if _is_chat(record):
        chat_document = Chat(tuple(_message(message, where) for message in record))
        if chat_document.text.strip():
            yield chat_document
        return
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


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(message, Mapping) and {"role", "from"} & set(message) for message in value)
    )


def _message(message: Mapping[str, Any], where: str) -> dict[str, str]:
    """Return one message with the keys chat templates know; ShareGPT's are translated."""
    role = str(message.get("role", message.get("from")))
    content = message.get("content", message.get("value"))
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = [part["text"] for part in content if isinstance(part, Mapping) and "text" in part]
        if not all(isinstance(text, str) for text in texts):
            raise CalibrationError(f"{where}: a part of a message's content has a text that is no string")
        content = "\n".join(texts)
    if content is not None and not isinstance(content, str):
        raise CalibrationError(f"{where}: a message's content is {type(content).__name__}, not a string")
    return {"role": _ROLES.get(role, role), "content": content or ""}


def holds_token_ids(spec: CalibrationSpec) -> bool:
    """Whether a set consists of lists of token ids, so that no tokenizer is needed."""
    if isinstance(spec, str | os.PathLike) or not isinstance(spec, Sequence):
        return False
    return bool(spec) and all(token_ids(item) is not None for item in spec)


def token_ids(item: Any) -> list[int] | None:
    """Return ``item`` as token ids where it is a flat sequence of integers (array or tensor too)."""
    if isinstance(item, str | Mapping):
        return None
    values = item.tolist() if hasattr(item, "tolist") else item
    if not isinstance(values, list | tuple):
        return None
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return None
    return list(values)
