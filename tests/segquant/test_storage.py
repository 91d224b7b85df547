"""Quantized modules on disk: complete, alike, and opened in one call."""

from __future__ import annotations

import json
import threading
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qwodel.exceptions import IntegrityError, ValidationError
from qwodel.segquant import load_quantized, quantize, save_quantized
from tests.segquant.toys import batches, outputs, toy

HELD = batches(2, seed=2)
SETTINGS: dict[str, Any] = {
    "default": {
        "opt": {"type": "svd", "low_rank": 4, "iterations": 1},
        "conv": True,
        "real_quant": True,
        "weight_quant": {"type": "int4", "axis": 1},
    },
    "head": {"weight_quant": {"type": "fpe4m3"}, "input_quant": {"type": "fpe4m3"}},
    "*.down": {"weight_quant": {"symmetric": False}, "input_quant": {"symmetric": False}},
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantize(toy(), batches(4), SETTINGS)


def test_state_dicts_are_complete(model: nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = deepcopy(model)
    for tensor in twin.state_dict().values():
        tensor.copy_(torch.zeros_like(tensor))
    assert not torch.equal(outputs(twin, HELD), outputs(model, HELD))
    twin.load_state_dict(state)
    assert torch.equal(outputs(twin, HELD), outputs(model, HELD))
    names = model.state_dict().keys()
    assert {"blocks.0.q.parts.0.weight.codes", "blocks.0.q.parts.0.inputs.scale", "head.bias", "stem.weight_codes.codes"} <= names  # fmt: skip


@pytest.mark.parametrize("target", ["model.safetensors", "folder"])
def test_what_is_saved_comes_back_bit_for_bit(target: str, model: nn.Module, tmp_path: Path) -> None:
    path = save_quantized(model, tmp_path / target, max_shard_size=20_000)
    loaded = load_quantized(path, toy(7))
    assert torch.equal(outputs(loaded, HELD), outputs(model, HELD))
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    if target == "folder":
        assert len(list(path.glob("*.safetensors"))) > 1
        config = json.loads((path / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "segquant"
    else:
        stored = load_file(path)
        codes = stored["blocks.0.up.parts.0.weight.codes"]
        assert codes.dtype == torch.uint8
        assert codes.shape[1] == 16  # 32 inputs, two a byte


def test_a_diffusers_directory_needs_no_model(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        cross_attention_dim=32, caption_channels=24, use_additional_conditions=False,
    ).eval()  # fmt: skip
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "timestep": torch.tensor([3.0, 700.0]),
        "return_dict": False,
    }
    quantize(model, [call], {"default": {"opt": {"type": "default"}}})
    save_quantized(model, tmp_path)
    loaded = load_quantized(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**call)[0], model(**call)[0])
    with pytest.raises(ValueError, match="segquant"):
        diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path)


def test_directories_open_in_threads_beside_layers_of_the_users_own(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        cross_attention_dim=32, caption_channels=24, use_additional_conditions=False,
    ).eval()  # fmt: skip
    quantize(
        model,
        [{"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 24),
          "timestep": torch.tensor([3.0, 700.0]), "return_dict": False}],
        {"default": {"opt": {"type": "default"}}},
    )  # fmt: skip
    save_quantized(model, tmp_path)
    register, found, devices = nn.Module.register_parameter, [], set()
    threads = [threading.Thread(target=lambda: found.append(load_quantized(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        devices.add(nn.Linear(4, 4).weight.device.type)
    assert nn.Module.register_parameter is register
    assert devices <= {"cpu"}
    expected = model.state_dict()
    assert len(found) == 4
    for each in found:
        state = each.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_what_does_not_fit_is_refused(model: nn.Module, tmp_path: Path) -> None:
    path = save_quantized(model, tmp_path / "m.safetensors")
    with pytest.raises(ValidationError, match="no model of diffusers"):
        load_quantized(path)
    with pytest.raises(ValidationError, match="has no layer"):
        load_quantized(path, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValidationError, match="no quantized layers"):
        save_quantized(toy(), tmp_path / "plain.safetensors")
    with pytest.raises(ValidationError, match="does not exist"):
        load_quantized(tmp_path / "nowhere")
    save_file({"w": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValidationError, match="no model quantized by segquant"):
        load_quantized(tmp_path / "other.safetensors", toy())
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    del tensors["head.parts.0.weight.scale"]
    save_file(tensors, tmp_path / "less.safetensors", metadata)
    with pytest.raises(IntegrityError, match=r"head\.parts\.0\.weight\.scale"):
        load_quantized(tmp_path / "less.safetensors", toy())
    newer = {key: value.replace('"format": 1', '"format": 2') for key, value in metadata.items()}
    save_file(load_file(path), tmp_path / "newer.safetensors", newer)
    with pytest.raises(ValidationError, match="of format 2"):
        load_quantized(tmp_path / "newer.safetensors", toy())
