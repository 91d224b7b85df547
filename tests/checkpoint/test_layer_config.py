from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwodel.checkpoint.plan.layer_config import LayerConfig, load_layer_config
from qwodel.exceptions import ConfigurationError

DOCUMENTED = {
    "layer_patterns": {
        ".*attention.*": {"format": "int8", "block_size": 64, "skip": False},
        ".*final_layer.*": {"format": "fp16", "skip": False},
    }
}


def test_the_documented_file_loads_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(DOCUMENTED))
    assert load_layer_config(tmp_path / "c.json") == DOCUMENTED


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"layer_patterns": {"a": {"formt": "int8"}}}, "formt"),
        ({"layer_pattern": {}}, "layer_pattern"),
        ({"layer_patterns": {"a": {"format": "int9"}}}, "int9"),
        ({"layer_patterns": {"a": {"block_size": 0}}}, "block_size"),
        ({"layer_patterns": {"(": {"skip": True}}}, "regular expression"),
        ({}, "layer_patterns"),
    ],
)
def test_the_offending_key_is_named(tmp_path: Path, document: Any, named: str) -> None:
    (tmp_path / "c.json").write_text(json.dumps(document))
    with pytest.raises(ConfigurationError, match=named.replace("(", r"\(")):
        load_layer_config(tmp_path / "c.json")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_what_is_not_an_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigurationError):
        load_layer_config(tmp_path / "c.json")


def test_first_pattern_wins_and_fullmatch_takes_the_whole_name() -> None:
    config = LayerConfig.from_mapping({"layer_patterns": {"attn": {"skip": True}, ".*": {"format": "fp16"}}})
    found = config.rule_for("blocks.0.attn.q.weight")
    assert found is not None
    assert found[0] == "attn"
    found = config.rule_for("blocks.0.attn.q.weight", fullmatch=True)
    assert found is not None
    assert found[0] == ".*"


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ({"format": "int8"}, "int8_row"),
        ({"format": "int8", "block_size": 64}, "int8_block"),
        ({"format": "FP8"}, "fp8_e4m3"),
    ],
)
def test_short_format_names(rule: dict[str, Any], name: str) -> None:
    config = LayerConfig.from_mapping({"layer_patterns": {"x": rule}})
    assert config.layer_patterns["x"].storage_name == name
