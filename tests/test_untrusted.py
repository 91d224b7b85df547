"""JSON, numbers, paths and files from outside: what is right comes through, and nothing else escapes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwodel.exceptions import CalibrationError, IntegrityError, QuantizationError, ValidationError
from qwodel.untrusted import (
    MAX_DEPTH,
    checked_int,
    checked_number,
    checked_path,
    foreign_errors,
    kind_of,
    open_regular,
    parse_json,
    read_json,
    read_json_object,
    read_regular,
)

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab[]{}\"\\é", max_size=3), inner, max_size=4),
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(_JSON, st.booleans())
def test_what_json_can_say_is_read_as_the_standard_library_reads_it(document: Any, ascii_only: bool) -> None:
    text = json.dumps(document, ensure_ascii=ascii_only)
    assert parse_json(text, "it") == json.loads(text)
    assert parse_json(text.encode(), "it", unique=True) == json.loads(text)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"[" * 100_000, "nested deeper"),
        (b"[" * 200 + b"]" * 200, "nested deeper"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "nested deeper"),
        (b'["[", ' * 200 + b"1" + b"]" * 200, "nested deeper"),
        (b"[1e400]", "too large"),
        (b"[-1e999]", "too large"),
        (b"9" * 5000, "5,000 digits"),
        (b"[NaN]", "NaN is no JSON number"),
        (b"-Infinity", "-Infinity is no JSON number"),
        (b'"\\ud800"', "not valid UTF-8"),
        (b'"\xff"', "not valid UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"\xff\xfe{\0}\0", "not valid UTF-8"),
        (b"", "not readable JSON"),
        (b"{", "not readable JSON"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
    ],
    ids=range(16),
)
def test_other_text_is_refused_with_the_callers_error(raw: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match=said) as caught:
        read_json(path, unique=True, error=IntegrityError, hint="again")
    assert str(path) in str(caught.value)
    assert caught.value.hint == "again"


def test_nesting_is_bounded_whoever_calls() -> None:
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deepest, "it")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)  # then only our own bound stands before the C stack's end
    try:
        with pytest.raises(ValidationError, match="nested deeper"):
            parse_json("[" + deepest + "]", "it")
        with pytest.raises(ValidationError):
            parse_json("[" * 10**6, "it")
    finally:
        sys.setrecursionlimit(before)


def test_brackets_in_strings_are_no_nesting_and_surrogate_pairs_are_text() -> None:
    assert parse_json(json.dumps(["[" * 500, '"{' * 500]), "it") == ["[" * 500, '"{' * 500]
    assert parse_json('"\\ud83d\\ude00"', "it") == "😀"
    assert parse_json('"\\\\ud800"', "it") == "\\ud800"
    assert parse_json("[NaN, Infinity]", "it", constants=True)[1] == math.inf


def test_long_text_costs_no_more_than_its_size() -> None:
    for text in (
        "[" * 3_000_000,
        "[]" * 1_000_000,
        '"' + "[" * 3_000_000,
        "[" + "1," * 500_000 + "1]",
        "1" * 3_000_000,
    ):
        tracemalloc.start()
        start = time.process_time()
        with contextlib.suppress(ValidationError):
            parse_json(text, "it")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.process_time() - start < 5
        assert peak < 40 * len(text)


def test_numbers_are_what_they_are_said_to_be() -> None:
    assert checked_int(7, "it") == 7
    for wrong in (True, 7.0, "7", None, -1, 1 << 63, [7]):
        with pytest.raises(CalibrationError, match="it is "):
            checked_int(wrong, "it", error=CalibrationError)
    assert checked_number(2, "it") == 2.0
    assert checked_number(0.5, "it", low=0, high=1) == 0.5
    for wrong in (True, "0.5", None, math.nan, math.inf, -0.5, 10**400, 1.5):
        with pytest.raises(ValidationError, match="it is "):
            checked_number(wrong, "it", low=0, high=1)


def _special(folder: Path) -> dict[str, str]:
    """Paths that are no regular file, by what they are."""
    os.mkfifo(folder / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "socket"))
    server.close()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "topipe").symlink_to(folder / "pipe")
    names = {name: str(folder / name) for name in ("pipe", "socket", "loop", "topipe")}
    return names | {
        "folder": str(folder), "nothing": str(folder / "nothing"), "device": "/dev/null", "zeros": "/dev/zero",
        "long": "x" * 300, "longer": str(folder / ("y" * 5000)), "nul": "a\0b", "user": "~nosuchuser/x",
        "below a file": __file__ + "/x", "surrogate": "a\ud800",
    }  # fmt: skip


def test_only_regular_files_are_opened_and_nothing_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for what, path in _special(Path()).items():
        start = time.monotonic()
        with pytest.raises(
            CalibrationError, match=r"no usable path|not known here|does not exist|cannot be read|not a file"
        ):
            open_regular(path, error=CalibrationError)
        assert time.monotonic() - start < 10, what
    good = tmp_path / "good"
    good.write_bytes(b"abc")
    assert open_regular(good).read() == b"abc"
    assert (kind_of(good), kind_of(tmp_path), kind_of(tmp_path / "none")) == ("file", "directory", None)
    with pytest.raises(ValidationError, match="3 bytes; at most 2"):
        read_regular(good, limit=2)
    assert checked_path("~/x") == Path.home() / "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_said(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    for path in (closed / "x", closed):
        with pytest.raises(ValidationError, match="cannot be read|not a file"):
            open_regular(path)


def test_an_object_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, kind in (("[1]", "an array"), ("null", "null"), ("3", "a number"), ('"a"', "a string")):
        path.write_text(text)
        with pytest.raises(ValidationError, match=f"no JSON object, but {kind}"):
            read_json_object(path)


def test_errors_of_others_are_translated_but_memory_is_not() -> None:
    with pytest.raises(ValidationError, match="it: 'boom'") as caught, foreign_errors("it"):
        raise KeyError("boom")
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(MemoryError), foreign_errors("it"):
        raise MemoryError
    with pytest.raises(QuantizationError, match="own"), foreign_errors("it"):
        raise IntegrityError("own")
