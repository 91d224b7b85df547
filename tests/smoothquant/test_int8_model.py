"""INT8 models of every architecture: their arithmetic, their files, their memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qwodel.exceptions import ConversionError, ValidationError
from qwodel.modules.int8_linear import Int8Linear
from qwodel.smoothquant import Int8ForCausalLM, Int8OPTForCausalLM, Scheme, fake_quantized
from qwodel.smoothquant.simulate import quantizable_layers
from tests.modeling.test_wiring import CASES, PROBE, tiny

FLIPS = 3e-2  # a value at the border between two codes may round either way


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=PROBE, use_cache=False).logits
    return found.double()


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("name", [name for name in CASES if name != "opt-post-norm"])
def test_every_architecture_computes_in_int8_saves_and_loads(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    exact = logits(model)
    with fake_quantized(model):
        simulated = logits(model)
    assert change(exact, simulated) > 1e-4
    int8 = Int8ForCausalLM.from_float(model)
    layers = [each for each in int8.modules() if isinstance(each, Int8Linear)]
    assert layers
    assert not [each for each in int8.modules() if type(each).__name__ == "Conv1D"]
    found = logits(int8)
    assert change(simulated, found) <= FLIPS
    loaded = Int8ForCausalLM.from_pretrained(int8.save_pretrained(tmp_path / "model"))
    assert torch.equal(logits(loaded), found)
    assert loaded.memory_footprint() == int8.memory_footprint()


@pytest.mark.parametrize("scheme", [Scheme("tensor", "tensor"), Scheme("channel", "token", 16)])
def test_other_schemes_are_computed_as_simulated(scheme: Scheme, tmp_path: Path) -> None:
    model = tiny("llama")
    with fake_quantized(model, scheme):
        simulated = logits(model)
    int8 = Int8ForCausalLM.from_float(model, scheme)
    assert change(simulated, logits(int8)) <= FLIPS
    loaded = Int8ForCausalLM.from_pretrained(int8.save_pretrained(tmp_path / "model"))
    assert torch.equal(logits(loaded), logits(int8))


def test_static_scales_are_kept(tmp_path: Path) -> None:
    model = tiny("opt")
    scales = dict.fromkeys(quantizable_layers(model), 0.05)
    with fake_quantized(model, Scheme("channel", "tensor"), input_scales=scales):
        simulated = logits(model)
    int8 = Int8ForCausalLM.from_float(model, Scheme("channel", "tensor"), input_scales=scales)
    assert change(simulated, logits(int8)) <= FLIPS
    folder = int8.save_pretrained(tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    assert float(stored["model.decoder.layers.0.fc1.input_scale"]) == pytest.approx(0.05)
    assert torch.equal(logits(Int8OPTForCausalLM.from_pretrained(folder)), logits(int8))
    with pytest.raises(ValidationError, match="scales not found for layer"):
        Int8ForCausalLM.from_float(tiny("opt"), input_scales={})


def test_it_writes_text_as_the_simulation_does(tmp_path: Path) -> None:
    model = tiny("opt")
    prompt = PROBE[:1]

    def write(model: Any) -> list[int]:
        ids: torch.Tensor = model.generate(
            input_ids=prompt, max_new_tokens=6, do_sample=False, min_new_tokens=6
        )
        return ids[0].tolist()

    with fake_quantized(model):
        expected = write(model)
    folder = Int8ForCausalLM.from_float(model).save_pretrained(tmp_path / "model")
    loaded = Int8OPTForCausalLM.from_pretrained(str(folder))
    assert write(loaded) == expected
    masked = loaded.forward(input_ids=prompt, attention_mask=torch.ones_like(prompt))
    assert masked.logits.shape == (1, 12, 61)


def test_linear_weights_take_half_of_fp16() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).half()
    before = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    int8 = Int8ForCausalLM.from_float(model)
    assert int8.memory_footprint() < 0.53 * before


def test_loading_never_holds_full_precision_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Int8ForCausalLM.from_float(tiny("llama")).save_pretrained(tmp_path / "model")
    made: list[tuple[int, ...]] = []
    original = nn.Linear.__init__

    def watched(self: nn.Linear, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.weight.device.type != "meta":
            made.append(tuple(self.weight.shape))

    monkeypatch.setattr(nn.Linear, "__init__", watched)
    loaded = Int8ForCausalLM.from_pretrained(folder)
    real = {tuple(p.shape) for n, p in loaded.named_parameters() if "layers" in n and p.ndim == 2}
    assert not real


def test_what_is_no_int8_model_is_refused(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(ValidationError, match="not quantized to INT8"):
        Int8ForCausalLM.from_pretrained(tmp_path / "float")
    with pytest.raises(ValidationError, match="no model directory"):
        Int8ForCausalLM.from_pretrained(tmp_path / "absent")
    folder = Int8ForCausalLM.from_float(tiny("llama")).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="unsupported model architecture llama"):
        Int8OPTForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError, match="no model.norm.weight"):
        Int8ForCausalLM.from_pretrained(folder)
    scheme = {"weights": {"num_bits": 4, "type": "int"}, "input_activations": None}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": scheme},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValidationError, match="pack-quantized"):
        Int8ForCausalLM.from_pretrained(folder)
    scheme["weights"] = {"num_bits": 8, "type": "int"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValidationError, match="weights only"):
        Int8ForCausalLM.from_pretrained(folder)


def test_transformers_refuses_what_only_we_read(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = Int8ForCausalLM.from_float(tiny("llama"), Scheme(rotate_inputs=16)).save_pretrained(
        tmp_path / "model"
    )
    with pytest.raises(ValueError, match="qwodel-int8"):
        AutoModelForCausalLM.from_pretrained(folder)
