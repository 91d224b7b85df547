from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwodel.exceptions import ValidationError
from qwodel.model_config import read_config


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": "LlamaForCausalLM"}, "architectures is not a list"),
        ({"architectures": [3]}, "architectures is not a list of names"),
        ({"quantization_config": [1]}, "quantization_config is not an object"),
        ({"quantization_config": {"config_groups": {"g": 3}}}, "config_groups.g is not an object"),
        ({"quantization_config": {"weight_block_size": [128, 128.5]}}, "weight_block_size is 128.5"),
        ({"text_config": "x"}, "text_config is not an object"),
        ({"text_config": {"vocab_size": "64"}}, "text_config: vocab_size is 64"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"_class_name": 3}, "_class_name is not a string"),
    ],
)
def test_entries_of_another_type_are_named(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValidationError, match=said):
        read_config(tmp_path)


def test_what_real_configurations_hold_is_read(tmp_path: Path) -> None:
    assert read_config(tmp_path) == {}
    config = {
        "architectures": None, "time_step_limit": [0.0, float("inf")], "vocab_size": 50288, "hidden_size": [320, 640],
        "quantization_config": None, "rope_scaling": {"type": "linear"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == config
