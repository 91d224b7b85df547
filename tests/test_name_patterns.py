from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwodel.exceptions import ConfigurationError
from qwodel.name_patterns import NamePattern

_ATOMS = st.sampled_from(
    [
        "a",
        "b",
        r"\.",
        ".",
        "[ab]",
        "[^a]",
        r"\d",
        r"\w",
        "^",
        "$",
        r"\b",
        "(?=b)",
        "(?!a)",
        "(?<=a)",
        "(?<!b.)",
    ]
)
_PATTERNS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda each: f"(?:{'|'.join(each)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,3}", "{2,}", "*?", "+?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        inner.map(lambda each: f"(?={each})"),
        inner.map(lambda each: f"(?i:{each})"),
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(_PATTERNS, st.text("abA.1\n", max_size=9))
def test_the_automaton_answers_as_re_does(pattern: str, name: str) -> None:
    compiled = NamePattern(pattern)
    automaton = compiled._slow()
    assert automaton.run(name, search=True, whole=False) == (re.search(pattern, name) is not None)
    assert automaton.run(name, search=False, whole=True) == (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (r"(a+)+$", "a" * 1000 + "b"),
        (r"(a|a)*$", "a" * 1000 + "b"),
        (r"(a?){60}a{60}", "a" * 59),
        (r"(.*)(.*)(.*)(.*)(.*)x", "a" * 1000),
        (r"a?" * 40 + "a" * 40, "a" * 39),
        (r"^(?=(a+)+$)b", "a" * 500 + "!"),
        (r"((a*)*)*b", "a" * 1000),
    ],
)
def test_no_expression_takes_long(pattern: str, name: str) -> None:
    start = time.perf_counter()
    assert not NamePattern(pattern).fullmatch(name)
    assert time.perf_counter() - start < 5


def test_everyday_rules_are_left_to_re() -> None:
    for pattern in (r"model\.layers\.\d+\.mlp", r".*lm_head.*", r"(q|k|v|o)_proj$", r"^(?!.*norm).*weight"):
        compiled = NamePattern(pattern)
        assert compiled.search("model.layers.0.mlp.down_proj.weight") == bool(
            re.search(pattern, "model.layers.0.mlp.down_proj.weight")
        )
        assert not compiled._too_slow(len("model.layers.0.mlp.down_proj.weight"))


@pytest.mark.parametrize(
    "pattern", ["(", "*a", "a" * 1001, "(" * 400 + ")" * 400, r"(a+)+\1$", "(?:a{1000}){1000}(b+)+"]
)
def test_what_cannot_be_bounded_is_a_configuration_error(pattern: str) -> None:
    with pytest.raises(ConfigurationError, match=r"rules|characters"):
        NamePattern(pattern, "rules")
