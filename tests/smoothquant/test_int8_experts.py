"""Stacked experts in INT8: their arithmetic, their files, who reads them, what is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qwodel import Quantizer
from qwodel.checkpoint.formats.packed import unpack_int8
from qwodel.exceptions import ValidationError
from qwodel.modules.int8_experts import Int8Experts
from qwodel.smoothquant import Int8ForCausalLM, fake_quantized
from qwodel.smoothquant.stacked_experts import stacked_experts
from tests.modeling.test_wiring import tiny
from tests.smoothquant.conftest import SIZES, difference, load, logits, one_thread, text, tiny_directory

__all__ = ["one_thread", "text"]  # fixtures

FLIPS = 3e-2


def test_it_is_the_formula() -> None:
    experts = next(iter(stacked_experts(tiny("mixtral")).values()))
    hidden = torch.randn(9, experts.gate_up_proj.shape[2]) * torch.linspace(0.1, 5, 9)[:, None]
    chosen, counts = torch.stack([torch.randperm(4)[:2] for _ in range(9)]), torch.rand(9, 2)
    weights = {name: getattr(experts, name).detach().double() for name in ("gate_up_proj", "down_proj")}
    int8 = Int8Experts.from_float(experts)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return torch.round(x / scale) * scale

    expected = torch.zeros(9, hidden.shape[1], dtype=torch.float64)
    for token in range(9):
        for place in range(2):
            expert = int(chosen[token, place])
            both = rounded(weights["gate_up_proj"][expert]) @ rounded(hidden[token].double())
            gate, up = both.chunk(2)
            between = rounded(torch.nn.functional.silu(gate) * up)
            expected[token] += counts[token, place] * (rounded(weights["down_proj"][expert]) @ between)
    found = int8(hidden, chosen, counts).double()
    # In fp64 a value at the border between two codes may round the other way.
    assert float((found - expected).norm() / expected.norm()) < 2e-3
    error = (int8.dequantize("down_proj") - weights["down_proj"]).norm() / weights["down_proj"].norm()
    assert error < 0.01
    exact, int8.exact = found, False
    assert torch.allclose(int8(hidden, chosen, counts).double(), exact, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_a_model_computes_saves_and_loads(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    before = logits(model)
    with fake_quantized(model, experts=False):
        without = logits(model)
    with fake_quantized(model):
        simulated = logits(model)
    assert torch.equal(logits(model), before), "everything is as it was"
    assert float((simulated - without).norm() / without.norm()) > 1e-4
    int8 = Int8ForCausalLM.from_float(model)
    assert sum(isinstance(each, Int8Experts) for each in int8.modules()) == 2
    assert difference(int8, simulated) <= FLIPS
    loaded = Int8ForCausalLM.from_pretrained(int8.save_pretrained(tmp_path / "model"))
    assert torch.equal(logits(loaded), logits(int8))
    assert loaded.memory_footprint() == int8.memory_footprint()


def test_experts_take_half_of_fp16() -> None:
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).half()
    before = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert Int8ForCausalLM.from_float(model).memory_footprint() < 0.53 * before


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixtral", {"optimizer": "gptq"}),
        ("qwen3-moe", {}),
        ("qwen3-moe", {"rotations": "all"}),
    ],
    ids=["gptq", "nearest", "rotated"],
)
def test_a_directory_for_transformers_and_for_us(
    name: str, options: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    source = tiny_directory(name, tmp_path / "source")
    quantizer = Quantizer(
        "smoothquant", str(source), tmp_path, alpha=0.5, calibration_dataset=str(text),
        **{"rotations": "none", **SIZES, **options},
    )  # fmt: skip
    folder = quantizer.quantize("w8a8_dynamic")
    info, exact = quantizer.get_model_info(), logits(load(source))
    assert not [key for key in info["kept"] if ".experts." in key]
    assert info["logits"]["int8"] <= FLIPS
    ours = Int8ForCausalLM.from_pretrained(folder)
    assert sum(isinstance(each, Int8Experts) for each in ours.modules()) == ours.config.num_hidden_layers
    assert difference(ours, exact) < 0.2
    if "optimizer" in options:
        assert any(".experts." in layer for layer in info["rounding"])
    if options.get("rotations") == "all":
        return
    assert info["logits"]["transformers"] <= FLIPS
    assert difference(load(folder), exact) < 0.2
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert quantization["config_groups"]["group_1"]["format"] == "pack-quantized"
    assert quantization["config_groups"]["group_1"]["input_activations"] is None


def test_experts_one_by_one_as_other_tools_write_them(text: Path, tmp_path: Path) -> None:
    source = tiny_directory("mixtral", tmp_path / "source")
    folder = Quantizer(
        "smoothquant", str(source), tmp_path, alpha=0.5, rotations="none",
        calibration_dataset=str(text), **SIZES,
    ).quantize("w8a8_static")  # fmt: skip
    expected = logits(Int8ForCausalLM.from_pretrained(folder))
    stored = load_file(folder / "model.safetensors")
    plain = {}
    for name, value in stored.items():
        if name.endswith("weight_packed"):
            plain[name.removesuffix("_packed")] = unpack_int8(value)
        elif not name.endswith("weight_shape"):
            plain[name] = value
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(Int8ForCausalLM.from_pretrained(folder)), expected)
    shapes = {name: value for name, value in stored.items() if name.endswith("weight_shape")}
    fewer_bits = {name: value * torch.tensor([1, 2]) for name, value in shapes.items()}
    save_file({**stored, **fewer_bits}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValidationError, match="not from INT8 codes"):
        Int8ForCausalLM.from_pretrained(folder)


def test_experts_that_compute_otherwise_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("mixtral")
    module = model.model.layers[0].mlp.experts
    original = type(module).forward
    module.forward = lambda *args: 2 * original(module, *args)
    assert list(stacked_experts(model)) == ["model.layers.1.mlp.experts"]
    assert "compute in a way of their own" in caplog.text
    int8 = Int8ForCausalLM.from_float(model)
    assert sum(isinstance(each, Int8Experts) for each in int8.modules()) == 1
