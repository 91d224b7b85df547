"""Reading back: what is wrong in a file is found, what is right is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwodel.algorithms.quant_types import FP8_E4M3
from qwodel.checkpoint.formats.registry import storage_format
from qwodel.checkpoint.layouts.comfyui import ComfyUILayout
from qwodel.checkpoint.plan.planning import build_plan
from qwodel.checkpoint.plan.recipe import Recipe
from qwodel.checkpoint.rounding.methods import Nearest, Rounding, ScaleSearch
from qwodel.checkpoint.run.convert import convert_checkpoint
from qwodel.checkpoint.run.verify import verify
from qwodel.exceptions import IntegrityError, ValidationError
from tests.checkpoint.checkpoints import FORMATS, llama_weights, random_weights, run


@pytest.mark.parametrize("rounding", [Nearest(), ScaleSearch()])
@pytest.mark.parametrize("victim", ["codes", "scale", "copy", "description"])
def test_a_flipped_byte_is_found(tmp_path: Path, victim: str, rounding: Rounding) -> None:
    save_file(llama_weights(1), tmp_path / "in.safetensors")
    recipe = Recipe(format=storage_format("int8_row"), rounding=rounding)
    plan = build_plan(tmp_path / "in.safetensors", recipe, ComfyUILayout())
    conversion = convert_checkpoint(plan, tmp_path / "out.safetensors")
    layer = "model.layers.0.mlp.down_proj"
    name = {
        "codes": f"{layer}.weight",
        "scale": f"{layer}.weight_scale",
        "copy": "lm_head.weight",
        "description": f"{layer}.comfy_quant",
    }
    place = plan.files[0].offsets[name[victim]]
    with (tmp_path / "out.safetensors").open("r+b") as file:
        file.seek(place + 2)
        byte = file.read(1)[0]
        file.seek(place + 2)
        file.write(bytes([byte ^ 0x40]))
    with pytest.raises((IntegrityError, ValidationError)):
        verify(conversion)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("int8_quip", "int8_convrot")])
def test_a_code_beside_the_nearest_is_found(tmp_path: Path, name: str) -> None:
    """Also one in a quarter of a million, in the last slab."""
    shape = (700, 512)
    generator = torch.Generator().manual_seed(3)
    # Each row has its own magnitude, so that a tensor's FP8 codes are subnormal in some.
    weight = torch.randn(shape, generator=generator) * torch.logspace(-5, 0, shape[0])[:, None]
    save_file({"blocks.0.proj.weight": weight.bfloat16()}, tmp_path / "in.safetensors")
    recipe = Recipe(format=storage_format(name), rounding=Nearest())
    plan = build_plan(tmp_path / "in.safetensors", recipe, ComfyUILayout())
    conversion = convert_checkpoint(plan, tmp_path / "out.safetensors")
    verify(conversion)
    begin = plan.files[0].offsets["blocks.0.proj.weight"]
    for place in (5, 350 * 512 + 77, shape[0] * shape[1] - 1):
        with (tmp_path / "out.safetensors").open("r+b") as file:
            file.seek(begin + place)
            right = file.read(1)[0]
            for wrong in (right ^ 1, 0x7F if name.startswith("fp8") else right ^ 0x80):  # 0x7F is FP8's NaN
                file.seek(begin + place)
                file.write(bytes([wrong]))
                file.flush()
                with pytest.raises(IntegrityError, match="not the nearest"):
                    verify(conversion)
            file.seek(begin + place)
            file.write(bytes([right]))
    verify(conversion)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("int8_quip", "int8_convrot")])
def test_the_nearest_codes_of_the_smallest_weights_are_accepted(tmp_path: Path, name: str) -> None:
    """Down to fp32's subnormal numbers, where products with a scale lose their last bits."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weight *= torch.logspace(-45, -33, 256, dtype=torch.float64)[:, None]
    save_file({"blocks.0.proj.weight": weight.float()}, tmp_path / "in.safetensors")
    _, quality = run(
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", format=name, rounding=Nearest()
    )
    assert quality["blocks.0.proj.weight"].sqnr_db > 20


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e4m3_row", "int8_row", "int8_block"])
def test_swapped_tensors_and_wrong_scales_are_found(tmp_path: Path, name: str) -> None:
    weights = random_weights({"a.weight": (64, 32), "b.weight": (64, 32)})
    weights["b.weight"] *= 1.37
    save_file(weights, tmp_path / "in.safetensors")
    recipe = Recipe(format=storage_format(name, 16 if name.endswith("block") else None), rounding=Nearest())
    plan = build_plan(tmp_path / "in.safetensors", recipe, ComfyUILayout())
    target = tmp_path / "out.safetensors"
    conversion = convert_checkpoint(plan, target)
    written, whole = load_file(target), target.read_bytes()
    for kind in ("weight", "weight_scale"):
        places = [plan.files[0].offsets[f"{layer}.{kind}"] for layer in "ab"]
        size = written[f"a.{kind}"].nbytes
        parts = [whole[place : place + size] for place in places]
        damaged = bytearray(whole)
        for place, part in zip(places, reversed(parts), strict=True):
            damaged[place : place + size] = part
        target.write_bytes(damaged)
        with pytest.raises(IntegrityError):
            verify(conversion)
    place = plan.files[0].offsets["a.weight_scale"]
    scale = written["a.weight_scale"].flatten()
    scale[-1] *= 1.01
    target.write_bytes(whole[:place] + scale.numpy().tobytes() + whole[place + scale.nbytes :])
    with pytest.raises(IntegrityError):
        verify(conversion)


def test_step_of_fp8_is_what_the_bound_assumes() -> None:
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    power = (codes.view(torch.int32) & 0x7F800000).view(torch.float32)
    step = (power * 2.0**-FP8_E4M3.mantissa_bits).clamp(min=FP8_E4M3.smallest_step)
    assert torch.equal(codes[1:] - codes[:-1], step[:-1])
