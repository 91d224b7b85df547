"""Packing, shuffling, special tokens and the cache, with small tokenizers and with real ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from qwodel.calibration import load_tokens
from qwodel.exceptions import CalibrationError, ConfigurationError

_WORDS = [f"w{n}" for n in range(400)]
BOS, EOS = 400, 401


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWODEL_CACHE", str(tmp_path / "cache"))


def _tokenizer(*, bos: bool = False, template: str | None = None) -> Any:
    """A tokenizer where ``w7`` is token 7, whatever stands around it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate([*_WORDS, "<s>", "</s>", "?"])}, "?")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def _text(start: int, count: int) -> str:
    return " ".join(_WORDS[start : start + count])


def test_documents_are_packed_without_padding_and_closed_as_the_tokenizer_does() -> None:
    texts = [_text(0, 3), _text(10, 4)]
    closed = load_tokens(texts, _tokenizer(), num_samples=1, seq_length=9)
    assert closed.dtype == np.int64
    assert closed.tolist() == [[0, 1, 2, EOS, 10, 11, 12, 13, EOS]]
    opened = load_tokens(texts, _tokenizer(bos=True), num_samples=1, seq_length=9)
    assert opened.tolist() == [[BOS, 0, 1, 2, BOS, 10, 11, 12, 13]]


def test_sequences_are_whole_cuts_of_the_text_in_an_order_the_seed_gives() -> None:
    text = [_text(0, 400)]

    def rows(seed: int) -> list[list[int]]:
        return load_tokens(text, _tokenizer(bos=True), num_samples=10, seq_length=10, seed=seed).tolist()

    first, again, other = rows(0), rows(0), rows(1)
    assert first == again
    assert first != other
    stream = [BOS, *range(400)]
    cuts = [stream[at : at + 10] for at in range(0, 400, 10)]
    assert all(row in cuts for row in first)
    assert len({row[1] for row in first}) == 10
    # Chosen among all that was read, not the head of it.
    assert sorted(first) != cuts[:10]


def test_reading_stops_once_enough_is_there() -> None:
    read = []

    def endless() -> Any:
        while True:
            read.append(1)
            yield _text(0, 99)

    tokens = load_tokens(endless(), _tokenizer(), num_samples=5, seq_length=20)
    assert tokens.shape == (5, 20)
    assert len(read) <= 5  # four times 100 tokens, 100 a document, and one to look ahead


def test_token_lists_are_taken_as_they_are() -> None:
    items = [[5, 6, 7], (8, 9), np.array([10, 11, 12])]
    tokens = load_tokens(items, _tokenizer(), num_samples=1, seq_length=8)
    assert tokens.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]


_TEMPLATE = "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "w1", "content": "w20 w21"}, {"role": "w2", "content": "w30"}]},
        {"conversations": [{"from": "w1", "value": "w20 w21"}, {"from": "w2", "value": "w30"}]},
        {"messages": [{"role": "w1", "content": [{"type": "text", "text": "w20 w21"}]},
                      {"role": "w2", "content": "w30"}]},
    ],
)  # fmt: skip
def test_conversations_go_through_the_template(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(record) + "\n")
    tokens = load_tokens(path, _tokenizer(bos=True, template=_TEMPLATE), num_samples=1, seq_length=9)
    assert tokens.tolist() == [[BOS, 1, 20, 21, EOS, BOS, 2, 30, EOS]]
    plain = load_tokens([record], _tokenizer(bos=True), num_samples=1, seq_length=4)
    assert plain.tolist() == [[BOS, 20, 21, 30]]


def test_a_template_that_refuses_says_so() -> None:
    chat = [[{"role": "system", "content": "w1"}]]
    refusing = _tokenizer(template="{{ raise_exception('no system role') }}")
    with pytest.raises(CalibrationError, match="no system role"):
        load_tokens(chat, refusing, num_samples=1, seq_length=1)


def test_too_little_text_says_how_much_was_found(tmp_path: Path) -> None:
    path = tmp_path / "small.txt"
    path.write_text(_text(0, 50))
    with pytest.raises(CalibrationError) as caught:
        load_tokens(path, _tokenizer(), num_samples=6, seq_length=10)
    assert "holds 51 tokens, 5 sequences of 10; 6 sequences (60 tokens) were asked for" in str(caught.value)
    assert load_tokens(path, _tokenizer(), num_samples=5, seq_length=10).shape == (5, 10)


def test_sequences_never_exceed_the_context(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qwodel.calibration"):
        tokens = load_tokens([_text(0, 300)], _tokenizer(), num_samples=3, seq_length=100, context_length=32)
    assert tokens.shape == (3, 32)
    assert "cut to the model's context of 32 tokens" in caplog.text


@pytest.mark.parametrize("sizes", [(0, 8), (8, 0), (-1, 8)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        load_tokens(["w1"], _tokenizer(), num_samples=sizes[0], seq_length=sizes[1])


def test_files_of_every_kind_give_the_same_tokens(tmp_path: Path) -> None:
    texts = [_text(0, 5), _text(100, 5)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "c.parquet")
    expected = [[0, 1, 2, 3, 4, EOS, 100, 101, 102, 103, 104, EOS]]
    for file in sorted(tmp_path.glob("?.*")):
        assert load_tokens(file, _tokenizer(), num_samples=1, seq_length=12).tolist() == expected, file
    folder = load_tokens(tmp_path, _tokenizer(), num_samples=3, seq_length=12)
    assert sorted(map(tuple, folder.tolist())) == [tuple(expected[0])] * 3


def test_the_cache_is_keyed_by_content_tokenizer_and_settings(tmp_path: Path) -> None:
    path, cache = tmp_path / "text.txt", tmp_path / "tokens"
    path.write_text(_text(0, 200))

    def load(tokenizer: Any = None, **changes: Any) -> np.ndarray[Any, Any]:
        settings = {"num_samples": 4, "seq_length": 10, **changes}
        return load_tokens(path, tokenizer or _tokenizer(), cache_dir=cache, **settings)

    def entries() -> int:
        return len(list(cache.glob("*.npy")))

    class Dead:
        """The same tokenizer, which must not be asked to tokenize."""

        def __init__(self) -> None:
            self.real = _tokenizer()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def __call__(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("tokenized again")

    first = load()
    assert entries() == 1
    assert np.array_equal(load(Dead()), first)
    load(seed=1)
    load(num_samples=3)
    load(_tokenizer(bos=True))
    assert entries() == 4
    path.write_text(_text(200, 200))
    assert load().min() >= 200
    entry = next(cache.glob("*.npy"))
    for file in cache.glob("*.npy"):
        file.write_bytes(b"damaged")
    assert load().min() >= 200
    assert entry.exists()


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "text.txt").write_text(_text(0, 50))
    tokens = load_tokens(
        tmp_path / "text.txt", _tokenizer(), num_samples=1, seq_length=8, cache_dir=tmp_path / "file"
    )
    assert tokens.shape == (1, 8)


def test_a_long_text_is_tokenized_as_one(stories15m: Path, wikitext: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories15m)
    tokens = load_tokens(wikitext, tokenizer, num_samples=64, seq_length=256, seed=3)
    assert tokens.shape == (64, 256)
    text = wikitext.read_text("utf-8")
    # What was read is the head of the file; each sequence decodes to a stretch of it.
    flat = "".join(text.split())
    for row in tokens[:8]:
        decoded = "".join(tokenizer.decode(row[1:-1]).split())
        assert len(decoded) > 200
        assert decoded in flat


def test_the_models_own_chat_template_is_used(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    if not tokenizer.chat_template:
        pytest.skip("this model has no chat template")
    messages = [
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Scattering."},
    ]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    tokens = load_tokens([{"messages": messages}], tokenizer, num_samples=1, seq_length=len(expected))
    assert tokens[0].tolist() == expected
