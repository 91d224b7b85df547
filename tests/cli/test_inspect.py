"""``qwodel inspect`` on what qwodel has published."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwodel import quantize


def inspect(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwodel", "inspect", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    save_file({"layers.0.proj.weight": torch.randn(64, 64)}, tmp_path / "m.safetensors")
    return quantize(tmp_path / "m.safetensors", tmp_path / "out", "int8", "int8_row")


def test_a_result_and_its_manifest_agree(published: Path) -> None:
    facts = json.loads(inspect(published, "--verify", "--json").stdout)
    assert facts["agrees"] == "hashes"
    assert Path(facts["manifest"]) == published.with_name("m-int8_row.manifest.json")
    assert "sizes" in inspect(published).stdout


def test_a_manifest_of_other_bytes_is_told(published: Path) -> None:
    data = bytearray(published.read_bytes())
    data[-1] ^= 1
    published.write_bytes(data)
    assert inspect(published).returncode == 0  # the sizes agree
    done = inspect(published, "--verify")
    assert done.returncode == 1
    assert "has other bytes than the manifest says" in done.stderr
    manifest = published.with_name("m-int8_row.manifest.json")
    manifest.write_text(manifest.read_text().replace('"bytes": ', '"bytes": 1'))
    assert re.search(r"agrees: +no: m-int8_row\.safetensors has [\d,]+ bytes", inspect(published).stdout)
    manifest.write_text('{"outputs": {"m-int8_row.safetensors": 3}}')
    done = inspect(published)
    assert done.returncode == 1
    assert "no manifest that can be read" in done.stderr


def test_what_has_no_manifest_cannot_be_verified(tmp_path: Path, published: Path) -> None:
    assert inspect(tmp_path / "m.safetensors").returncode == 0
    done = inspect(tmp_path / "m.safetensors", "--verify")
    assert done.returncode == 2
    assert "has no manifest with hashes" in done.stderr
