from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwodel.display import shown, shown_lines

ANYTHING = st.text(st.characters(codec=None), max_size=60)  # lone surrogates too


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("größe 模型 😀 é", "größe 模型 😀 é"),
        ("[/nope].weight", "[/nope].weight"),
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("evil\u202etxt.exe", "evil\\u202etxt.exe"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("tag\U000e0041", "tag\\U000e0041"),
        ("not utf-8: \udcff", "not utf-8: \\udcff"),
    ],
)
def test_what_no_terminal_should_get_is_escaped(text: str, safe: str) -> None:
    assert shown(text) == safe


@given(ANYTHING)
def test_anything_is_one_safe_line_and_nothing_safe_is_changed(text: str) -> None:
    safe = shown(text)
    safe.encode("utf-8")
    assert not any(unicodedata.category(each) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for each in safe)
    assert shown(safe) == safe


@given(ANYTHING)
def test_lines_are_kept_and_cannot_pass_for_ours(text: str) -> None:
    first, *others = shown_lines(text).split("\n")
    assert first == shown(first)
    assert all(each.startswith("  ") for each in others)


def test_long_text_is_cut_and_says_so() -> None:
    assert shown("a" * 50, 10) == "aaaaaaaaaa… (40 characters more)"
    assert len(shown_lines("x\n" * 1_000_000)) < 200_000


def test_anything_has_a_text() -> None:
    assert shown(None) == "None"
    assert shown([1, "\x1b"]) == "[1, '\\x1b']"
