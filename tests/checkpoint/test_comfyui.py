from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwodel.checkpoint.formats.registry import CODECS, storage_format
from qwodel.checkpoint.formats.scaled import Scaled
from qwodel.checkpoint.layouts.comfyui import ComfyUILayout
from qwodel.exceptions import ConfigurationError
from tests.checkpoint.checkpoints import llama_weights, run, sqnr

LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(llama_weights(1), tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def describe(out: dict[str, torch.Tensor], layer: str = LAYER) -> dict[str, object]:
    found: dict[str, object] = json.loads(bytes(out[f"{layer}.comfy_quant"].tolist()))
    return found


def decode_with_comfy_kitchen(out: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """What ComfyUI's own kernels make of a layer, chosen by its description as ComfyUI chooses."""
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    layouts = {
        "float8_e4m3fn": kitchen.TensorCoreFP8Layout,
        "float8_e5m2": kitchen.TensorCoreFP8Layout,
        "int8_tensorwise": kitchen.TensorWiseINT8Layout,
    }
    layout = layouts[str(describe(out, layer)["format"])]
    codes = out[f"{layer}.weight"]
    params = layout.Params(
        scale=out[f"{layer}.weight_scale"], orig_dtype=torch.float32, orig_shape=tuple(codes.shape)
    )
    decoded: torch.Tensor = layout.dequantize(codes, params)
    return decoded


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "int8_tensor", "int8_row"])
@pytest.mark.parametrize("device", ["eager"])
def test_comfyui_decodes_to_what_is_reported(source: Path, tmp_path: Path, name: str, device: str) -> None:
    kitchen = pytest.importorskip("comfy_kitchen")
    conversion, quality = run(source, tmp_path / "out.safetensors", format=name)
    assert conversion.plan.warnings == ()
    weights, out = load_file(source), load_file(tmp_path / "out.safetensors")
    assert len(quality) == 4
    with kitchen.use_backend(device):
        for key, found in quality.items():
            decoded = decode_with_comfy_kitchen(out, key.removesuffix(".weight"))
            assert sqnr(weights[key].float(), decoded) == pytest.approx(found.sqnr_db, abs=0.02)


def test_row_scales_stand_in_a_column(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out.safetensors", format="int8_row")
    out = load_file(tmp_path / "out.safetensors")
    assert out[f"{LAYER}.weight_scale"].shape == (48, 1)
    assert describe(out) == {"format": "int8_tensorwise", "per_row": True, "orig_dtype": "torch.bfloat16"}


def test_header_and_tensors_agree(source: Path, tmp_path: Path) -> None:
    layout = ComfyUILayout(header_metadata=True, full_precision_matrix_mult=True)
    run(source, tmp_path / "out.safetensors", layout, format="int8_row")
    out = load_file(tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        header = json.loads(file.metadata()["_quantization_metadata"])
    assert header["format_version"] == "1.0"
    described = {key.removesuffix(".comfy_quant"): None for key in out if key.endswith(".comfy_quant")}
    assert set(header["layers"]) == set(described)
    for layer, description in header["layers"].items():
        assert description == describe(out, layer)
        assert description["full_precision_matrix_mult"] is True


@pytest.mark.parametrize(("full_precision", "count"), [(False, 0), (True, 2)])
def test_legacy_scaled_fp8(source: Path, tmp_path: Path, full_precision: bool, count: int) -> None:
    layout = ComfyUILayout(legacy=True, full_precision_matrix_mult=full_precision, input_scale=True)
    run(source, tmp_path / "out.safetensors", layout, format="fp8_e4m3")
    out = load_file(tmp_path / "out.safetensors")
    assert out["scaled_fp8"].numel() == count
    assert out["scaled_fp8"].dtype == torch.float8_e4m3fn
    assert out[f"{LAYER}.scale_input"].item() == 1.0
    assert not any(key.endswith((".comfy_quant", ".weight_scale")) for key in out)
    decoded = out[f"{LAYER}.weight"].float() * out[f"{LAYER}.scale_weight"]
    assert sqnr(load_file(source)[f"{LAYER}.weight"].float(), decoded) > 30


@pytest.mark.parametrize("name", ["fp8_e4m3_row", "fp8_e4m3_block", "int8_block"])
def test_formats_comfyui_cannot_load_say_so(
    source: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    conversion, quality = run(source, tmp_path / "out.safetensors", format=name)
    (warning,) = conversion.plan.warnings
    assert "ComfyUI cannot load" in warning
    assert warning in caplog.text
    assert quality


def test_every_unloadable_format_has_a_reason() -> None:
    supports = [codec.comfyui() for codec in CODECS.values()]
    assert all(each.loads or each.reason for each in supports)
    assert not all(each.loads for each in supports)


def test_groups_have_no_comfyui_format() -> None:
    from qwodel.algorithms.quant_types import INT8, Granularity

    with pytest.raises(ConfigurationError, match="1x64"):
        ComfyUILayout().support(Scaled("int8_group", INT8, Granularity.group(64)))


def test_input_scale(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out.safetensors", ComfyUILayout(input_scale=True), format="fp8_e4m3")
    assert load_file(tmp_path / "out.safetensors")[f"{LAYER}.input_scale"].item() == 1.0
    with pytest.raises(ConfigurationError, match="input_scale"):
        run(source, tmp_path / "out2.safetensors", ComfyUILayout(input_scale=True), format="int8_row")


def test_legacy_has_no_header_metadata() -> None:
    with pytest.raises(ConfigurationError):
        ComfyUILayout(legacy=True, header_metadata=True)


def test_our_own_files_can_be_sources_again(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "int8.safetensors", format="int8_row")
    run(tmp_path / "int8.safetensors", tmp_path / "fp16.safetensors", format="fp16")
    weights, back = load_file(source), load_file(tmp_path / "fp16.safetensors")
    assert set(back) == set(weights)
    assert sqnr(weights[f"{LAYER}.weight"].float(), back[f"{LAYER}.weight"]) > 38


def test_default_block_size_is_in_the_description(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out.safetensors", format="int8_block", block_size=16)
    out = load_file(tmp_path / "out.safetensors")
    assert describe(out)["group_size"] == 16
    assert out[f"{LAYER}.weight_scale"].shape == (3, 6)
    assert storage_format("int8_block").granularity.block_cols == 128
