"""``convert_to_int8`` with statistics: every option of GPTQ and QuIP, on files that are decoded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy_kitchen.backends.eager as comfy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qwodel.algorithms.quant_types import INT8, ROW, TENSOR, Granularity
from qwodel.algorithms.scales import dequantize, quantize_matrix
from qwodel.exceptions import CalibrationError, ConfigurationError, ValidationError
from qwodel.int8 import GPTQInt8Converter, convert_to_int8, read_weights
from qwodel.modeling.collect import collect_statistics

SHAPES = {
    "blocks.0.q": (48, 96),
    "blocks.0.up": (130, 96),
    "blocks.0.down": (96, 130),
    "blocks.0.odd": (32, 37),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        layers = {name.rsplit(".")[-1]: nn.Linear(n, m, bias=False) for name, (m, n) in SHAPES.items()}
        self.blocks = nn.ModuleList([nn.ModuleDict(layers)])

    def forward(self, x: torch.Tensor) -> None:
        block = self.blocks[0]
        block["q"](x)
        block["down"](torch.nn.functional.gelu(block["up"](x)))
        block["odd"](x[:, :37])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("columnwise")
    net = Net()
    save_file(
        {name: each.detach().clone() for name, each in net.state_dict().items()}, folder / "in.safetensors"
    )
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(96, 96, generator=generator) * torch.logspace(0, -2, 96)
    batches = [torch.randn(200, 96, generator=generator) @ mix for _ in range(3)]
    collect_statistics(net, batches, folder / "stats.safetensors")
    torch.save(batches, folder / "batches.pt")
    return folder


def convert(bench: Path, tmp_path: Path, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    given: dict[str, Any] = {"calibration_data_path": str(bench / "stats.safetensors"), **options}
    result = convert_to_int8(
        str(bench / "in.safetensors"), str(tmp_path / "out.safetensors"), True, {}, 0, 0, **given
    )
    return result, load_file(tmp_path / "out.safetensors")


def output_error(bench: Path, path: Path, layer: str) -> float:
    """‖XWᵀ − XŴᵀ‖² with inputs that the test computes by itself."""
    net = Net()
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].double())
            )
    with torch.no_grad():
        for batch in torch.load(bench / "batches.pt"):
            net(batch)
    decoded = dict(read_weights(path))[f"{layer}.weight"].double()
    weight = net.get_parameter(f"{layer}.weight").detach().double()
    return float((torch.cat(inputs[layer]) @ (weight - decoded).T).square().sum())


@pytest.mark.parametrize("mode", ["row", "tensor", "block", "convrot"])
@pytest.mark.parametrize("optimizer", ["gptq", "adamw"])
def test_outputs_are_nearer_than_with_nearest_codes(bench, tmp_path, mode, optimizer):
    options = {"scaling_mode": mode} | ({"block_size": 16} if mode == "block" else {})
    settings = {"num_iter": 60} if optimizer == "adamw" else {}
    convert(bench, tmp_path, optimizer=optimizer, **options, **settings)
    for layer in SHAPES:
        aware = output_error(bench, tmp_path / "out.safetensors", layer)
        plain = tmp_path / "plain.safetensors"
        convert_to_int8(
            str(bench / "in.safetensors"), str(plain), True, {}, 0, 0, no_learned_rounding=True, **options
        )
        assert aware < (0.9 if optimizer == "gptq" else 1.0) * output_error(bench, plain, layer), layer


def test_gptq_is_the_default_with_statistics(bench, tmp_path):
    result, out = convert(bench, tmp_path)
    assert {each.rounding for each in result.quality} == {"gptq"}
    _, named = convert(bench, tmp_path, optimizer="gptq")
    assert all(torch.equal(out[name], named[name]) for name in out)


def test_files_hold_the_converters_codes(bench, tmp_path):
    from qwodel.checkpoint.rounding.statistics import StatisticsFile

    _, out = convert(bench, tmp_path, optimizer="gptq", gptq_actorder=True)
    with StatisticsFile(bench / "stats.safetensors") as statistics:
        for layer in SHAPES:
            gram = statistics.read(layer).gram
            weight = load_file(bench / "in.safetensors")[f"{layer}.weight"]
            codes, scale, done = GPTQInt8Converter(device="cpu").convert(weight, H=gram)
            assert torch.equal(out[f"{layer}.weight"], codes)
            assert torch.equal(out[f"{layer}.weight_scale"], scale)
            assert torch.equal(dict(read_weights(tmp_path / "out.safetensors"))[f"{layer}.weight"], done)


def test_convrot_files_are_what_the_reader_decodes(bench, tmp_path):
    _, out = convert(bench, tmp_path, optimizer="gptq", scaling_mode="convrot")
    decoded = dict(read_weights(tmp_path / "out.safetensors"))
    for layer, (_, columns) in SHAPES.items():
        described = json.loads(bytes(out[f"{layer}.comfy_quant"].tolist()))
        codes, scale = out[f"{layer}.weight"], out[f"{layer}.weight_scale"]
        if columns % 4:
            assert "convrot" not in described
            expected = codes.float() * scale
        else:
            size = described["convrot_groupsize"]
            assert columns % size == 0
            assert described["format"] == "int8_tensorwise"
            assert described["convrot"] is True
            expected = comfy.dequantize_int8_convrot_weight(codes, scale, size)
        assert torch.allclose(decoded[f"{layer}.weight"], expected, atol=1e-5)


def test_stored_transforms_decode_from_the_file_alone(bench, tmp_path):
    result, out = convert(bench, tmp_path, optimizer="quip", quip_store_transformed=True, quip_seed=3)
    assert any("int8_quip" in warning or "qwodel" in warning for warning in result.warnings)
    source = load_file(bench / "in.safetensors")
    for name, decoded in read_weights(tmp_path / "out.safetensors"):
        layer = name.removesuffix(".weight")
        assert out[f"{layer}.quip_signs_in"].unique().tolist() == [-1, 1]
        error = (decoded - source[name]).norm() / source[name].norm()
        assert error < 0.02, layer
        raw = out[name].float() * out[f"{layer}.weight_scale"]
        assert (raw - source[name]).norm() / source[name].norm() > 0.5, "raw codes are in another basis"
    other, seeded = convert(bench, tmp_path, optimizer="quip", quip_store_transformed=True, quip_seed=4)
    assert not torch.equal(out["blocks.0.q.weight"], seeded["blocks.0.q.weight"])
    del other


def test_stored_transforms_without_their_signs_are_refused(bench, tmp_path):
    _, out = convert(bench, tmp_path, optimizer="quip", quip_store_transformed=True)
    del out["blocks.0.q.quip_signs_in"]
    save_file(out, tmp_path / "broken.safetensors")
    with pytest.raises(ValidationError, match="signs"):
        dict(read_weights(tmp_path / "broken.safetensors"))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (48, 1)),
        ({"quip_requant_tensor_per_row": False}, ()),
        ({"quip_requant_scheme": "block", "block_size": 32}, (2, 3)),
        ({"quip_store_transformed": True, "quip_hadamard": False}, (48, 1)),
    ],
)
def test_quip_scales_in_the_original_basis(bench, tmp_path, options, shape):
    result, out = convert(bench, tmp_path, optimizer="quip", **options)
    assert out["blocks.0.q.weight_scale"].shape == shape
    assert {each.rounding for each in result.quality} == {"quip"}
    kind = {(): TENSOR, (48, 1): ROW}.get(shape, Granularity.block(32))
    source = load_file(bench / "in.safetensors")
    for layer in SHAPES:
        nearest = quantize_matrix(source[f"{layer}.weight"], INT8, kind)
        codes = dequantize(out[f"{layer}.weight"], out[f"{layer}.weight_scale"], kind)
        assert not torch.equal(codes, nearest.dequantize())


@pytest.mark.parametrize(
    ("optimizer", "option", "same"),
    [
        ("gptq", {"gptq_actorder": True}, False),
        ("gptq", {"gptq_fast": False}, True),
        ("gptq", {"gptq_turbo": True}, True),
        ("quip", {"quip_actorder": False}, False),
        (
            "quip",
            {"quip_checkpointed": True, "quip_checkpoint_threshold": 8, "quip_checkpoint_segments": 3},
            True,
        ),
    ],
)
def test_options_change_the_codes_or_only_the_work(bench, tmp_path, optimizer, option, same):
    if "gptq_turbo" in option:
        pytest.importorskip("triton")
    _, plain = convert(bench, tmp_path, optimizer=optimizer)
    _, other = convert(bench, tmp_path, optimizer=optimizer, **option)
    assert all(torch.equal(plain[name], other[name]) for name in plain) is same


def test_without_statistics_nothing_is_invented(bench, tmp_path, caplog):
    for optimizer in ("gptq", "quip"):
        result, out = convert(bench, tmp_path, optimizer=optimizer, calibration_data_path=None)
        assert "no calibration data" in caplog.text
        assert {each.rounding for each in result.quality} == {"nearest"}
        source = load_file(bench / "in.safetensors")["blocks.0.q.weight"]
        assert torch.equal(out["blocks.0.q.weight"], quantize_matrix(source, INT8, ROW).codes)
        caplog.clear()


def test_layers_without_statistics_are_listed(bench, tmp_path):
    source = load_file(bench / "in.safetensors")
    source["blocks.1.q.weight"] = torch.randn(48, 96)
    save_file(source, tmp_path / "more.safetensors")
    done = convert_to_int8(
        str(tmp_path / "more.safetensors"), str(tmp_path / "out.safetensors"), True, {}, 0, 0,
        calibration_data_path=str(bench / "stats.safetensors"),
    )  # fmt: skip
    assert {layer: report.note for layer, report in done.rounding.items() if report.note} == {
        "blocks.1.q": "its layer saw no calibration data"
    }
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["rounding"]["blocks.1.q"]["method"] == "nearest"
    assert (
        manifest["rounding"]["blocks.0.q"]["output_sqnr_db"]
        > manifest["rounding"]["blocks.0.q"]["nearest_sqnr_db"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "quip", "quip_requant_scheme": "rows"}, "quip_requant_scheme"),
        ({"optimizer": "quip", "quip_store_transformed": True, "quip_requant_scheme": "block"}, "no effect"),
        ({"optimizer": "quip", "quip_seed": 1}, "quip_store_transformed only"),
        ({"optimizer": "quip", "quip_hadamard": False}, "quip_store_transformed only"),
        ({"optimizer": "quip", "scaling_mode": "tensor"}, "choose the scales"),
        ({"optimizer": "gptq", "num_iter": 3}, "num_iter"),
        ({"no_learned_rounding": True}, "calibration_data_path"),
        ({"optimizer": "gptq", "quip_seed": 1}, "quip_seed"),
        ({"optimizer": "quip", "gptq_actorder": True}, "gptq_actorder"),
        ({"smoothquant": True}, "smoothquant"),
        ({"calibration_lora_path": "x"}, "calibration_lora_path"),
    ],
)
def test_what_would_have_no_effect_is_refused(bench, tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        convert(bench, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_files_that_hold_no_statistics(bench, tmp_path):
    for name in ("missing.safetensors", "in.safetensors"):
        with pytest.raises(CalibrationError):
            convert(bench, tmp_path, calibration_data_path=str(bench / name))
