"""The manual's worked examples: a new format and a new rounding method, each from its own file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwodel import Quantizer, quantize
from qwodel.backends import load_backend
from qwodel.checkpoint.formats import registry as formats
from qwodel.checkpoint.rounding import registry as methods
from qwodel.checkpoint.source import dequantize_sources
from qwodel.checkpoint.source.weights import read_weights

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def _load(path: str, patch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, EXAMPLES / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, spec.name, module)  # as dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(96, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def source(weight: torch.Tensor, tmp_path: Path) -> Path:
    save_file(
        {"blocks.0.proj.weight": weight, "blocks.0.norm.weight": torch.ones(64)}, tmp_path / "in.safetensors"
    )
    return tmp_path / "in.safetensors"


def test_a_new_format(
    source: Path, weight: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = _load("new-format/int4_row.py", monkeypatch)
    monkeypatch.setitem(formats._BY_NAME, "int4_row", example.INT4_ROW)
    recognisers = (example.recognise_int4_row, *formats.RECOGNISERS)
    monkeypatch.setattr(dequantize_sources, "RECOGNISERS", recognisers)
    assert load_backend("int8").formats()["int4_row"].bits == 4.0
    path = quantize(source, tmp_path / "out", backend="int8", format="int4-row")
    stored = load_file(path)
    assert stored["blocks.0.proj.weight"].shape == (96, 32)
    decoded = dict(read_weights(path))["blocks.0.proj.weight"]
    scale = weight.abs().amax(dim=1, keepdim=True) / 7
    torch.testing.assert_close(decoded, (weight / scale).round().clamp(-7, 7) * scale)
    again = quantize(path, tmp_path / "again", backend="int8", format="fp16")
    torch.testing.assert_close(load_file(again)["blocks.0.proj.weight"], decoded.half())


def test_a_new_rounding_method(
    source: Path, weight: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = _load("new-rounding/stochastic.py", monkeypatch)
    monkeypatch.setitem(methods._BY_NAME, "stochastic", example.STOCHASTIC)
    quantizer = Quantizer("int8", source, tmp_path / "out", optimizer="stochastic")
    path = quantizer.quantize("int8_row")
    (layer,) = quantizer.get_model_info()["quality"]
    assert layer["rounding"] == "stochastic"
    error = dict(read_weights(path))["blocks.0.proj.weight"] - weight
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert float((error.abs() / step).max()) <= 1.001
    # Right on average, as rounding to nearest is not for all rows alike.
    assert abs(float((error / step).mean())) < 0.02
