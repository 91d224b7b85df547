"""Weights of zeros are kept exactly, and what is said of them is a number that JSON has, or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwodel import Quantizer
from tests.modeling.tiny_models import make
from tests.smoothquant.conftest import one_thread, save_tokenizer, text, with_outliers

__all__ = ["one_thread", "text"]  # fixtures

ZEROS = ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.gate_proj.weight")  # fmt: skip

RUNS: tuple[tuple[str, str, bool, dict[str, Any]], ...] = (
    ("int8", "int8_row", False, {}),
    ("int8", "int8_row", False, {"optimizer": "original", "num_iter": 3}),
    ("int8", "int8_row", True, {}),
    ("int8", "int8_row", True, {"optimizer": "gptaq"}),
    ("fp8", "fp8_e4m3", True, {}),
    ("smoothquant", "w8a8_dynamic", True, {}),
    ("smoothquant", "w8a8_static", True, {"optimizer": "gptq"}),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, made = tmp_path_factory.mktemp("models") / "zeros", with_outliers(make("llama"))
    with torch.no_grad():
        for name in ZEROS:
            made.get_parameter(name).zero_()
    made.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize(("backend", "kind", "calibrated", "options"), RUNS)
def test_what_is_said_of_zeros_is_json(
    backend: str,
    kind: str,
    calibrated: bool,
    options: dict[str, Any],
    model: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    data = {"calibration_dataset": str(text), "num_samples": 8, "seq_length": 32} if calibrated else {}
    quantizer = Quantizer(backend, model, tmp_path, **data, **options)
    quantizer.quantize(kind)
    info = quantizer.get_model_info()
    manifest = json.loads(Path(info["manifest"]).read_text("utf-8"))
    for document in (info, manifest):
        json.dumps(document, allow_nan=False)
        assert [document["sqnr_db"][name] for name in ZEROS] == [None] * len(ZEROS)
        assert {each["mse"] for each in document["quality"] if each["name"] in ZEROS} == {0.0}
