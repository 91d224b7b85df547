from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.formats.fp4 import E2M1_VALUES
from qwodel.checkpoint.formats.swizzle import unswizzle_scales
from qwodel.checkpoint.source.dequantize_sources import resolve_sources
from qwodel.exceptions import ValidationError
from tests.checkpoint.checkpoints import run, sqnr


def read(path: Path, name: str, config: dict[str, Any] | None = None, step: int = 5) -> torch.Tensor:
    """Decode one weight a few rows at a time, as the engine does."""
    with UnifiedSafetensorsLoader(path, low_memory=True) as reader:
        (source,) = [each for each in resolve_sources(reader, config).tensors if each.name == name]
        rows = source.shape[0]
        parts = [source.row_decoder.rows(reader, at, min(at + step, rows)) for at in range(0, rows, step)]
        return torch.cat(parts).float()


FP8 = torch.randn(40, 70, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("suffix", "scale"),
    [
        ("weight_scale", torch.tensor(0.25)),
        ("weight_scale", torch.tensor([0.25])),
        ("scale_weight", torch.tensor([0.25])),
        ("weight_scale", torch.rand(40, 1) + 0.1),
        ("weight_scale", torch.rand(40) + 0.1),
        ("weight_scale", (torch.rand(40, 1) + 0.1).bfloat16()),
    ],
)
def test_fp8_with_tensor_and_row_scales(tmp_path: Path, suffix: str, scale: torch.Tensor) -> None:
    save_file({"a.weight": FP8, f"a.{suffix}": scale}, tmp_path / "m.safetensors")
    factor = scale.float().reshape(-1, 1) if scale.numel() > 1 else scale.float().reshape(())
    assert torch.equal(read(tmp_path / "m.safetensors", "a.weight"), FP8.float() * factor)


@pytest.mark.parametrize("experts", [None, 3])
def test_deepseek_blocks(tmp_path: Path, experts: int | None) -> None:
    shape = (300, 200) if experts is None else (experts, 300, 200)
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(*shape[:-2], 3, 2) + 0.1
    name = "a.weight" if experts is None else "experts.gate_up_proj"
    save_file({name: codes, f"{name}_scale_inv": scale}, tmp_path / "m.safetensors")
    expected = (
        codes.float() * scale.repeat_interleave(128, -2)[..., :300, :].repeat_interleave(128, -1)[..., :200]
    )
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert torch.equal(read(tmp_path / "m.safetensors", name, config, step=1 if experts else 77), expected)


def test_block_sizes_follow_from_shapes_or_are_asked_for(tmp_path: Path) -> None:
    codes = torch.randn(300, 200).to(torch.float8_e4m3fn)
    save_file({"a.weight": codes, "a.weight_scale_inv": torch.rand(3, 2)}, tmp_path / "m.safetensors")
    read(tmp_path / "m.safetensors", "a.weight")
    save_file({"a.weight": codes, "a.weight_scale_inv": torch.rand(7, 2)}, tmp_path / "m.safetensors")
    with pytest.raises(ValidationError, match="no known block size"):
        read(tmp_path / "m.safetensors", "a.weight")


def pack(codes: torch.Tensor) -> torch.Tensor:
    return codes[..., 0::2] | codes[..., 1::2] << 4


def test_mxfp4_as_gpt_oss_stores_it(tmp_path: Path) -> None:
    codes = torch.randint(16, (2, 6, 3, 32), dtype=torch.uint8)
    exponents = torch.randint(120, 135, (2, 6, 3), dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file({f"{name}_blocks": pack(codes), f"{name}_scales": exponents}, tmp_path / "m.safetensors")
    values = torch.tensor(E2M1_VALUES)[codes.long()] * 2.0 ** (exponents.float() - 127)[..., None]
    expected = values.reshape(2, 6, 96).transpose(1, 2)
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    assert torch.equal(read(tmp_path / "m.safetensors", name, config, step=1), expected)


def test_mxfp4_as_transformers_decodes_it(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(120, 135, (2, 6, 3), dtype=torch.uint8)
    save_file({"e.down_proj_blocks": blocks, "e.down_proj_scales": scales}, tmp_path / "m.safetensors")
    expected = mxfp4.convert_moe_packed_tensors(blocks.clone(), scales.clone())
    assert torch.equal(read(tmp_path / "m.safetensors", "e.down_proj", step=1), expected.float())


@pytest.mark.parametrize("style", ["modelopt", "compressed-tensors"])
def test_nvfp4(tmp_path: Path, style: str) -> None:
    codes = torch.randint(16, (24, 64), dtype=torch.uint8)
    scales = (torch.rand(24, 4) * 4 + 0.5).to(torch.float8_e4m3fn)
    values = torch.tensor(E2M1_VALUES)[codes.long()].reshape(24, 4, 16) * scales.float()[..., None]
    if style == "modelopt":
        tensors = {"a.weight": pack(codes), "a.weight_scale": scales, "a.weight_scale_2": torch.tensor(0.125)}
    else:
        tensors = {
            "a.weight_packed": pack(codes),
            "a.weight_scale": scales,
            "a.weight_global_scale": torch.tensor([8.0]),
        }
    save_file(tensors, tmp_path / "m.safetensors")
    assert torch.equal(read(tmp_path / "m.safetensors", "a.weight"), values.reshape(24, 64) * 0.125)


def test_nvfp4_as_comfy_kitchen_writes_it(tmp_path: Path) -> None:
    kitchen = pytest.importorskip("comfy_kitchen")
    tensor = pytest.importorskip("comfy_kitchen.tensor")
    weight = torch.randn(160, 96)
    with kitchen.use_backend("eager"):
        codes, params = tensor.TensorCoreNVFP4Layout.quantize(weight)
        expected = tensor.TensorCoreNVFP4Layout.dequantize(codes, params)
    description = json.dumps({"format": "nvfp4", "group_size": 16, "orig_shape": [160, 96]}).encode()
    save_file(
        {
            "a.weight": codes, "a.weight_scale": params.block_scale, "a.weight_scale_2": params.scale.reshape(()),
            "a.comfy_quant": torch.tensor(list(description), dtype=torch.uint8),
        },
        tmp_path / "m.safetensors",
    )  # fmt: skip
    decoded = read(tmp_path / "m.safetensors", "a.weight", step=33)
    assert sqnr(expected, decoded) > 60
    assert sqnr(weight, decoded) > 18


def test_unswizzle_inverts_the_documented_order() -> None:
    scales = torch.arange(256 * 8, dtype=torch.float32).reshape(256, 8)
    tiled = (
        scales.reshape(2, 128, 2, 4).permute(0, 2, 1, 3).reshape(-1, 4, 32, 4).transpose(1, 2).reshape(256, 8)
    )
    assert torch.equal(unswizzle_scales(tiled, 200, 7), scales[:200, :7])


def test_plain_fp8_is_a_cast_only_while_nothing_has_scales(tmp_path: Path) -> None:
    save_file({"a.weight": FP8, "b.weight": FP8.clone()}, tmp_path / "m.safetensors")
    assert torch.equal(read(tmp_path / "m.safetensors", "a.weight"), FP8.float())
    save_file(
        {"a.weight": FP8, "a.weight_scale": torch.tensor(2.0), "b.weight": FP8.clone()},
        tmp_path / "m.safetensors",
    )
    with pytest.raises(ValidationError, match=r"b\.weight"):
        read(tmp_path / "m.safetensors", "a.weight")


@pytest.mark.parametrize(
    ("tensors", "config", "named"),
    [
        ({"a.qweight": torch.zeros(2, 2, dtype=torch.int32)}, {}, "GPTQ"),
        ({"a.weight": torch.zeros(4, 1, dtype=torch.uint8), "a.weight.absmax": torch.zeros(1)}, {}, "bitsandbytes"),
        ({"a.weight": torch.zeros(4, 4)}, {"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"a.weight_packed": torch.zeros(2, 2, dtype=torch.int32)}, {}, "packed integers"),
        ({"a.weight": FP8, "a.weight_scale": torch.zeros(40, 3, dtype=torch.uint8)}, {}, "U8 scales"),
        ({"a.weight": FP8, "a.weight_scale": torch.ones(7, 3)}, {}, "block size"),
        ({"a.weight": torch.zeros(4, 4, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1),
          "a.hadamard_quip": torch.ones((), dtype=torch.int8)}, {}, "QuIP"),
        ({"a.weight": torch.zeros(4, 4, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1), "a.comfy_quant":
          torch.tensor(list(b'{"format": "int8_tensorwise", "convrot": true}'), dtype=torch.uint8)}, {}, "rotated"),
        ({"a.weight": torch.zeros(4, 4), "a.comfy_quant": torch.tensor(list(b"{"), dtype=torch.uint8)}, {}, "description a.comfy_quant is not readable JSON"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(tmp_path: Path, tensors: Any, config: Any, named: str) -> None:
    save_file(tensors, tmp_path / "m.safetensors")
    with (
        UnifiedSafetensorsLoader(tmp_path / "m.safetensors") as reader,
        pytest.raises(ValidationError, match=named),
    ):
        resolve_sources(reader, config)


def test_quantized_source_is_requantized_and_its_marks_dropped(tmp_path: Path) -> None:
    weight = torch.randn(64, 64) * 0.1
    codes = (weight / 0.01).to(torch.float8_e4m3fn)
    source = {
        "blocks.0.a.weight": codes, "blocks.0.a.scale_weight": torch.tensor(0.01),
        "blocks.0.a.scale_input": torch.tensor(1.0), "norm.weight": torch.ones(64),
        "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "final_head.lm_head.weight": codes.clone(), "final_head.lm_head.scale_weight": torch.tensor(0.01),
    }  # fmt: skip
    save_file(source, tmp_path / "in.safetensors")
    conversion, _ = run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", format="int8_row")
    out = load_file(tmp_path / "out.safetensors")
    assert set(conversion.plan.dropped) == {"scaled_fp8", "blocks.0.a.scale_input"}
    expected = codes.float() * 0.01
    assert sqnr(expected, out["blocks.0.a.weight"].float() * out["blocks.0.a.weight_scale"]) > 38
    assert torch.equal(out["final_head.lm_head.weight"], expected.bfloat16())
    mentioned = {part for each in conversion.plan.tensors for part in each.source.stored}
    assert mentioned | set(conversion.plan.dropped) == set(source)
