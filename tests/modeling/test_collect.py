from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from qwodel.checkpoint.rounding.statistics import StatisticsFile
from qwodel.exceptions import CalibrationError, Cancelled, ConfigurationError, ValidationError
from qwodel.modeling.collect import collect_statistics

from .test_observe import plain_inputs
from .tiny_models import batches, make


class Denoiser(nn.Module):
    """Not a transformers model: positional and keyword inputs, a layer that is never run, a 3-D input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Linear(6, 10), nn.Linear(10, 10, bias=False)
        self.gate, self.unused = nn.Linear(10, 4), nn.Linear(3, 3)

    def forward(self, x, *, timestep):
        hidden = torch.nn.functional.gelu(self.embed(x) + timestep)
        return self.mix(hidden).sum() + self.gate(hidden).sum()


def noise(count=4):
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(2, 5, 6, generator=generator), "timestep": torch.tensor(float(n))}
        for n in range(count)
    ]


def test_statistics_of_any_module(tmp_path):
    model, data = Denoiser(), noise()
    path = collect_statistics(model, data, tmp_path / "stats.safetensors")
    expected = plain_inputs(model, data)
    with StatisticsFile(path) as file:
        assert set(file.layers) == {"embed", "mix", "gate"}
        for layer, inputs in expected.items():
            found = file.read(layer)
            assert found.count == len(inputs) == 40
            assert torch.allclose(found.gram.double(), inputs.T @ inputs / 40, rtol=1e-5, atol=1e-6)
            assert torch.allclose(found.mean.double(), inputs.mean(dim=0), atol=1e-6)
            assert torch.equal(found.channel_max, inputs.abs().amax(dim=0).float())
        assert file.read("unused") is None
        assert file.read("gate", gram=False).gram is None
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "stats.manifest.json",
        "stats.safetensors",
    ]
    manifest = json.loads((tmp_path / "stats.manifest.json").read_text())
    assert manifest["schema"] == 1
    assert manifest["source"]["name"] == "Denoiser"
    assert manifest["outputs"].keys() == {"stats.safetensors"}


def test_spilled_sums_are_the_same(tmp_path):
    model, data = make("llama"), batches("llama")
    inside = collect_statistics(model, data, tmp_path / "inside.safetensors")
    spilled = collect_statistics(model, data, tmp_path / "spilled.safetensors", memory=8 * 32 * 32)
    assert inside.read_bytes() == spilled.read_bytes()


def test_files_without_gram_matrices_are_small(tmp_path):
    model, data = Denoiser(), noise()
    path = collect_statistics(model, data, tmp_path / "s.safetensors", gram=False)
    with StatisticsFile(path) as file:
        assert file.read("mix").gram is None
        assert file.read("mix").channel_max.shape == (10,)


def test_experts_are_numbered(tmp_path):
    path = collect_statistics(make("mixtral"), batches("mixtral"), tmp_path / "s.safetensors")
    with StatisticsFile(path) as file:
        assert file.read("model.layers.0.mlp.experts.down_proj.3").gram.shape == (48, 48)


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("blocks.0.fc", "model.diffusion_model.blocks.0.fc"),
        ("model.diffusion_model.blocks.0.fc", "blocks.0.fc"),
        ("blocks.0.fc", "blocks.0.fc"),
    ],
)
def test_layers_are_found_under_wrapped_names(tmp_path, stored, asked):
    model = nn.Module()
    part = model
    *path, last = stored.split(".")
    for name in path:
        part.add_module(name, nn.Module())
        part = getattr(part, name)
    fc = nn.Linear(3, 2)
    part.add_module(last, fc)
    file = collect_statistics(
        model, [torch.ones(1, 3)], tmp_path / "s.safetensors", forward=lambda _, x: fc(x)
    )
    with StatisticsFile(file) as statistics:
        assert statistics.read(asked).count == 1
        assert statistics.read("other") is None


def test_a_chosen_layer_alone(tmp_path):
    path = collect_statistics(Denoiser(), noise(), tmp_path / "s.safetensors", layers=["mix"])
    with StatisticsFile(path) as file:
        assert file.layers == ("mix",)


def test_what_cannot_be_collected_leaves_nothing(tmp_path):
    target = tmp_path / "s.safetensors"
    with pytest.raises(ConfigurationError, match="'nothing' is no linear layer"):
        collect_statistics(Denoiser(), noise(), target, layers=["nothing"])
    with pytest.raises(CalibrationError, match="no calibration batches"):
        collect_statistics(Denoiser(), [], target)
    with pytest.raises(CalibrationError, match="no linear layer"):
        collect_statistics(nn.ReLU(), [torch.ones(1)], target)
    broken = [{"x": torch.full((1, 6), float("inf")), "timestep": torch.zeros(())}]
    with pytest.raises(ValidationError, match=r"embed\.weight: .*NaN or Inf"):
        collect_statistics(Denoiser(), broken, target)

    def stop(percent, stage, message):
        if percent > 40:
            raise RuntimeError("enough")

    with pytest.raises(Cancelled):
        collect_statistics(Denoiser(), noise(), target, progress_callback=stop)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept(tmp_path):
    target = tmp_path / "s.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(ValidationError, match="exists"):
        collect_statistics(Denoiser(), noise(), target)
    assert target.read_bytes() == b"mine"
    collect_statistics(Denoiser(), noise(), target, overwrite=True)
    assert target.read_bytes() != b"mine"


def test_files_that_hold_no_statistics(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(CalibrationError, match="there is no statistics file"):
        StatisticsFile(tmp_path / "missing.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CalibrationError, match="no file of activation statistics"):
        StatisticsFile(tmp_path / "other.safetensors")
