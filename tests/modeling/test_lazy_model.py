from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from qwodel.exceptions import ConfigurationError, ConversionError, ValidationError
from qwodel.modeling.lazy_model import config_of, open_lazily

from .tiny_models import ARCHITECTURES, save


def opened(folder, **settings):
    file = safe_open(folder / "model.safetensors", "pt")
    return open_lazily(config_of(folder), file.keys(), file.get_tensor, **settings)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_loaded_is_what_transformers_loads(name, tmp_path):
    model = save(name, tmp_path)
    expected = type(model).from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    lazy = opened(tmp_path)
    assert all(parameter.device.type == "meta" for parameter in lazy.model.parameters())
    lazy.load(lazy.model, "")
    lazy.model.tie_weights()
    found = lazy.model.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_a_part_is_loaded_and_unloaded_alone(tmp_path):
    save("llama", tmp_path)
    lazy = opened(tmp_path, dtype=torch.bfloat16)
    block = lazy.model.model.layers[1]
    lazy.load(block, "model.layers.1")
    loaded = {name for name, each in lazy.model.named_parameters() if each.device.type != "meta"}
    assert loaded == {f"model.layers.1.{name}" for name, _ in block.named_parameters()}
    assert {each.dtype for each in block.parameters()} == {torch.bfloat16}
    lazy.unload(block)
    assert all(each.device.type == "meta" for each in lazy.model.parameters())


def test_experts_are_assembled_from_replaced_parts(tmp_path):
    """Expert 2's down projection comes from what is given; everything else stays unloaded."""
    save("mixtral", tmp_path)
    lazy = opened(tmp_path)
    experts = lazy.model.model.layers[0].mlp.experts
    prefix = "model.layers.0.mlp.experts"
    parts = lazy.parts(f"{prefix}.down_proj")
    assert [part.index for part in parts] == [0, 1, 2, 3]
    given = torch.full((32, 48), 7.0)
    lazy.load(experts, prefix, {parts[2].key: given})
    assert experts.gate_up_proj.device.type == "meta"
    assert torch.equal(experts.down_proj[2], given)
    assert torch.equal(experts.down_proj[1], lazy.read(parts[1].key))


def test_weights_of_another_model(tmp_path):
    save("llama", tmp_path)
    file = safe_open(tmp_path / "model.safetensors", "pt")
    config = config_of(tmp_path) | {"intermediate_size": 64}
    lazy = open_lazily(config, file.keys(), file.get_tensor)
    with pytest.raises(ConversionError, match=r"shape \[48, 32\].*\[64, 32\]"):
        lazy.load(lazy.model, "")


def test_architectures_that_transformers_does_not_have(tmp_path):
    with pytest.raises(ConfigurationError, match="no architecture Llama99"):
        open_lazily({"architectures": ["Llama99"], "model_type": "llama"}, [], lambda _: torch.ones(1))
    with pytest.raises(ValidationError, match="names no architecture"):
        open_lazily({"model_type": "llama"}, [], lambda _: torch.ones(1))


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_configurations_that_are_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValidationError, match=r"config\.json"):
        config_of(tmp_path)
