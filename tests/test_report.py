from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwodel.report import TensorQuality, decibels, envelope, json_safe, json_text

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return {key: _finite(each) for key, each in value.items()} if isinstance(value, dict) else value


@given(JSON)
def test_json_is_strict_and_says_what_was_meant(value: Any) -> None:
    text = json_text(value)
    assert text.encode("utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == _finite(value)


class Kind(Enum):
    ONE = "one"


@dataclass
class Layer:
    name: str
    error: float
    token: str = field(default="hf_secret", repr=False)


@pytest.mark.parametrize(
    ("value", "safe"),
    [
        (math.inf, None),
        (np.float32(1.5), 1.5),
        (np.int64(3), 3),
        (np.float64("nan"), None),
        (torch.tensor(2.5), 2.5),
        (torch.float16, "torch.float16"),
        (Path("a/b"), "a/b"),
        (Kind.ONE, "one"),
        ((1, 2), [1, 2]),
        ({"b", "a"}, ["a", "b"]),
        ({1: {Path("x"): True}}, {"1": {"x": True}}),
        (Layer("q", -math.inf), {"name": "q", "error": None}),
        (b"bytes", "b'bytes'"),
    ],
)
def test_every_type_has_its_json(value: Any, safe: Any) -> None:
    assert json_safe(value) == safe


def test_json_does_not_reach_a_terminal_raw() -> None:
    assert json_text({"\x1b": "\x9b\u202e\u200b\udcff"}, indent=None) == (
        '{"\\u001b": "\\u009b\\u202e\\u200b\\udcff"}'
    )


def test_a_report_cannot_replace_the_envelope() -> None:
    made = envelope(
        backend="b", format="f", source={"sha256": {}}, recipe={}, report={"backend": "x", "extra": 1}
    )
    assert (made["backend"], made["extra"]) == ("b", 1)


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(100.0, 1.0, 20.0), (0.0, 0.0, math.inf), (1.0, 0.0, math.inf), (0.0, 1.0, -math.inf), (1.0, math.nan, -math.inf)],
)  # fmt: skip
def test_decibels(signal: float, noise: float, expected: float) -> None:
    assert decibels(signal, noise) == pytest.approx(expected)
    quality = TensorQuality("a", decibels(signal, noise), 0.0)
    assert quality.reported_db == (expected if math.isfinite(expected) else None)
    assert quality.judged_by == quality.sqnr_db
