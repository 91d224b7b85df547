"""Token sequences for calibration: documents tokenized, packed without padding, shuffled."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from qwodel.cache import cache_dir as default_cache
from qwodel.calibration.hub_sets import hub_revision
from qwodel.calibration.records import CalibrationSpec, Chat, Document, describe_dataset
from qwodel.calibration.texts import calibration_files, load_documents, local_path
from qwodel.calibration.token_cache import TokenCache
from qwodel.exceptions import CalibrationError, ConfigurationError

__all__ = ["Tokenizer", "load_tokens"]

TokenArray = npt.NDArray[np.int64]

_RULES = 1  # of tokenizing, packing and choosing; raise it when the same input gives other tokens
_READ_AHEAD = 4  # sequences read for every one that is kept
_PIECE = 1 << 16  # characters of a long text that are tokenized at a time
_log = logging.getLogger("qwodel.calibration")


class Tokenizer(Protocol):
    """What :func:`load_tokens` asks of a transformers tokenizer."""

    eos_token_id: Any

    def __call__(self, text: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Tokenize a text or a list of texts; ``["input_ids"]`` of the result is used."""


def load_tokens(
    spec: CalibrationSpec,
    tokenizer: Tokenizer | None,
    *,
    num_samples: int,
    seq_length: int,
    seed: int = 0,
    split: str = "train",
    token: str | None = None,
    column: str | None = None,
    context_length: int | None = None,
    cache_dir: Path | None = None,
) -> TokenArray:
    """Return exactly ``num_samples`` sequences of ``seq_length`` tokens, packed without padding.

    Documents are tokenized one by one with the special tokens the tokenizer adds; where it adds
    none, its end-of-sequence token closes each. Conversations go through the chat template, if
    there is one. Token ids are taken as they are. Everything is joined and cut into sequences.

    Reading stops at four times the sequences asked for; what was read is shuffled with ``seed``,
    and the first ``num_samples`` are returned. So a large hub set is never downloaded whole.

    The result is cached under the SHA-256 of everything it depends on: the files' bytes (or the
    hub set's commit), the tokenizer and the arguments. An iterable is not cached. Where the hub
    cannot be asked, the commit it last gave is used.

    Args:
        spec: see :data:`~qwodel.calibration.CalibrationSpec`.
        tokenizer: a transformers tokenizer, or anything with its interface; ``None`` suffices for
            token ids.
        num_samples: sequences to return.
        seq_length: tokens a sequence; cut to ``context_length`` with a warning.
        seed: of the shuffle.
        split: which split of a hub dataset.
        token: Hugging Face token for a gated or private dataset.
        column: the text column; found by name where ``None``.
        context_length: the longest sequence the model takes.
        cache_dir: where to cache; ``calibration`` in qwodel's cache where ``None``.

    Returns:
        int64 token ids ``[num_samples, seq_length]``.

    Raises:
        CalibrationError: the set is missing, unreadable, or too small (it says how much was found).
        ConfigurationError: ``num_samples`` or ``seq_length`` is below one.
    """
    if num_samples < 1 or seq_length < 1:
        raise ConfigurationError(
            f"num_samples and seq_length must be at least 1, not {num_samples} and {seq_length}"
        )
    if context_length is not None and seq_length > context_length:
        _log.warning("seq_length %d is cut to the model's context of %d tokens", seq_length, context_length)
        seq_length = context_length
    cache = TokenCache(cache_dir or default_cache() / "calibration")
    revision, source = _identity(spec, token, cache)
    key = cache.key(source, tokenizer, (_RULES, num_samples, seq_length, seed, split, column))
    found = cache.load(key, (num_samples, seq_length))
    if found is not None:
        return found
    documents = load_documents(spec, split=split, token=token, column=column, revision=revision)
    tokens = _read(_encode(documents, tokenizer), num_samples * seq_length * _READ_AHEAD)
    rows = len(tokens) // seq_length
    if rows < num_samples:
        raise CalibrationError(
            f"the calibration set {describe_dataset(spec)} is too small: it holds {len(tokens):,} tokens, "
            f"{rows} sequences of {seq_length}; {num_samples} sequences ({num_samples * seq_length:,} tokens) "
            "were asked for",
            hint="give more text, or a smaller num_samples or seq_length",
        )
    sequences = tokens[: rows * seq_length].reshape(rows, seq_length)
    chosen = sequences[np.random.default_rng(seed).permutation(rows)[:num_samples]]
    cache.store(key, chosen)
    return chosen


def _identity(spec: CalibrationSpec, token: str | None, cache: TokenCache) -> tuple[str | None, str | None]:
    """Return the hub commit to read, and what identifies the set's content (``None`` if nothing does)."""
    path = local_path(spec)
    if path is not None:
        return None, _content_hash(path)
    if not isinstance(spec, str | os.PathLike):
        return None, None
    name = os.fspath(spec)
    if name.startswith((".", "/", "~")):
        return None, None
    revision = hub_revision(name, token)
    if revision is None:
        revision = cache.last_revision(name)
        return None, revision and f"{name}@{revision}"
    cache.note_revision(name, revision)
    return revision, f"{name}@{revision}"


def _content_hash(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        for file in calibration_files(path):
            digest.update(f"{file.suffix.casefold()}\n{file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _read(sequences: Iterable[Sequence[int]], enough: int) -> TokenArray:
    parts, count = [], 0
    for ids in sequences:
        parts.append(np.asarray(ids, dtype=np.int64))
        count += len(ids)
        if count >= enough:
            break
    return np.concatenate(parts)[:enough] if parts else np.empty(0, np.int64)


class _Affixes(NamedTuple):
    """The special tokens around a document."""

    prefix: list[int]
    suffix: list[int]


def _encode(documents: Iterable[Document], tokenizer: Tokenizer | None) -> Iterator[list[int]]:
    affixes: _Affixes | None = None  # token ids need no tokenizer
    template = bool(getattr(tokenizer, "chat_template", None))
    for document in documents:
        if isinstance(document, list):
            yield document
        elif tokenizer is None:
            raise CalibrationError("calibration text needs a tokenizer", hint="give lists of token ids")
        elif isinstance(document, Chat) and template:
            # The template writes the special tokens itself.
            yield _ids(tokenizer, _rendered(document, tokenizer))
        else:
            affixes = affixes or _affixes(tokenizer)
            yield affixes.prefix
            for piece in _pieces(document.text if isinstance(document, Chat) else document):
                yield _ids(tokenizer, piece)
            yield affixes.suffix


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _affixes(tokenizer: Tokenizer) -> _Affixes:
    bare = _ids(tokenizer, "a")
    full = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            prefix, suffix = full[:start], full[start + len(bare) :]
            break
    else:
        prefix, suffix = [], []
    if not prefix and not suffix and tokenizer.eos_token_id is not None:
        suffix = [tokenizer.eos_token_id]
    return _Affixes(prefix, suffix)


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text at line ends: tokenizers take far longer than twice for twice the text."""
    start = 0
    while len(text) - start > _PIECE:
        end = text.find("\n", start + _PIECE)
        if end < 0:
            break
        yield text[start : end + 1]
        start = end + 1
    if start < len(text):
        yield text[start:]


def _rendered(chat: Chat, tokenizer: Any) -> str:
    messages: list[Mapping[str, str]] = list(chat.messages)
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:
        # Templates raise what their authors wrote in them.
        raise CalibrationError(
            f"the model's chat template does not take a conversation of the calibration set: {error}",
            hint="its roles may be unknown to the template; or name a text column",
        ) from error
    return text
