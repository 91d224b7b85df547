"""Texts given in Python, through whole runs: used, and written nowhere."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwodel import Quantizer
from tests.smoothquant.conftest import WORDS, llama, one_thread

__all__ = ["llama", "one_thread"]  # fixtures

RUNS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("int8", "int8_row", {"layout": "comfyui"}),
    ("int8", "int8_row", {"layout": "transformers", "optimizer": "adamw", "num_iter": 3}),
    ("fp8", "fp8_e4m3", {}),
    ("smoothquant", "w8a8_dynamic", {}),
    ("smoothquant", "w8a8_static", {"optimizer": "gptq"}),
)


def texts() -> Iterator[str]:
    """Each begins with a word that stands nowhere else."""
    words = random.Random(1)
    for number in range(40):
        yield f"zaphod{number} " + " ".join(words.choices(WORDS, k=40))


@pytest.mark.parametrize(("backend", "kind", "options"), RUNS)
def test_a_generator_serves_two_runs_and_no_manifest_repeats_it(
    backend: str, kind: str, options: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    quantizer = Quantizer(
        backend, llama, tmp_path,
        calibration_dataset=texts(), num_samples=8, seq_length=32, batch_size=4, overwrite=True, **options,
    )  # fmt: skip
    first = contents(quantizer.quantize(kind))
    again = quantizer.quantize(kind)
    assert contents(again) == first
    info = quantizer.get_model_info()
    manifest = json.loads(Path(info["manifest"]).read_text("utf-8"))
    assert manifest["recipe"]["calibration_dataset"] == "40 items given in Python"
    assert "zaphod" not in json.dumps(manifest) + repr(info) + repr(vars(quantizer))
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"zaphod" not in file.read_bytes()


def contents(path: Path) -> dict[str, bytes]:
    files = path.rglob("*") if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files if file.is_file() and "manifest" not in file.name}
