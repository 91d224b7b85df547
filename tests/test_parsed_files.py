from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwodel.parsed_files import ParsedFiles


def test_a_header_is_parsed_once_and_again_where_the_file_was_written_to(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    parsed = ParsedFiles()
    first = parsed.header(file)
    assert parsed.header(file) is first
    save_file({"b": torch.zeros(3)}, file)
    assert list(parsed.header(file).tensors) == ["b"]


def test_what_is_done_to_a_configuration_stays_with_its_reader(tmp_path: Path) -> None:
    parsed = ParsedFiles()
    assert parsed.config(tmp_path) == {}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": 8}}))
    parsed.config(tmp_path)["text_config"].clear()
    assert parsed.config(tmp_path) == {"text_config": {"hidden_size": 8}}
    (tmp_path / "config.json").unlink()
    assert parsed.config(tmp_path) == {}
