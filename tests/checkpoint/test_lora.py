from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.lora.merge import (
    LoraSource,
    load_lora_for_merging,
    load_lora_tensors,
    merge_lora_into_weight,
    merge_multiple_loras,
    plan_merges,
)
from qwodel.exceptions import ValidationError
from tests.checkpoint.checkpoints import DATA, run, sqnr

BASE = {
    "model.diffusion_model.blocks.0.attn.to_q.weight": (32, 24),
    "model.diffusion_model.blocks.0.attn.to_out.0.weight": (24, 32),
    "model.diffusion_model.blocks.0.conv.weight": (16, 8, 3, 3),
    "model.diffusion_model.blocks.0.proj_in.weight": (16, 8, 1, 1),
    "model.diffusion_model.blocks.0.norm.weight": (24,),
}
TO_Q = "model.diffusion_model.blocks.0.attn.to_q.weight"


def base_weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in BASE.items()}


def halves(out: int, into: int, rank: int = 4, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, into, generator=generator) * 0.5, torch.randn(
        out, rank, generator=generator
    ) * 0.5


def merged(tmp_path: Path, loras: list[LoraSource], **recipe: Any) -> dict[str, torch.Tensor]:
    """What the engine writes when it merges and changes nothing else."""
    save_file(base_weights(), tmp_path / "base.safetensors")
    run(tmp_path / "base.safetensors", tmp_path / "out.safetensors", format="int8_row", exclude_layers="attn.to_out",
        custom_layers=None, loras=tuple(loras), filters=("flux",), **recipe)  # fmt: skip
    out = load_file(tmp_path / "out.safetensors")
    layer = TO_Q.removesuffix(".weight")
    out[TO_Q] = out[TO_Q].float() * out[f"{layer}.weight_scale"]
    return out


NAMES = {
    "kohya": ("lora_unet_blocks_0_attn_to_q.lora_down.weight", "lora_unet_blocks_0_attn_to_q.lora_up.weight"),
    "peft": ("base_model.model.blocks.0.attn.to_q.lora_A.weight", "base_model.model.blocks.0.attn.to_q.lora_B.weight"),
    "peft adapter": ("base_model.model.blocks.0.attn.to_q.lora_A.default.weight",
                     "base_model.model.blocks.0.attn.to_q.lora_B.default.weight"),
    "diffusers": ("unet.blocks.0.attn.to_q.lora.down.weight", "unet.blocks.0.attn.to_q.lora.up.weight"),
    "transformer": ("transformer.blocks.0.attn.to_q.lora_A.weight", "transformer.blocks.0.attn.to_q.lora_B.weight"),
    "processor": ("unet.blocks.0.attn.processor.to_q_lora.down.weight", "unet.blocks.0.attn.processor.to_q_lora.up.weight"),
    "comfyui": ("diffusion_model.blocks.0.attn.to_q.lora_A.weight", "diffusion_model.blocks.0.attn.to_q.lora_B.weight"),
}  # fmt: skip


@pytest.mark.parametrize("scheme", NAMES)
def test_every_naming_scheme_finds_its_weight(tmp_path: Path, scheme: str) -> None:
    down, up = halves(32, 24)
    names = NAMES[scheme]
    save_file({names[0]: down, names[1]: up}, tmp_path / "lora.safetensors")
    out = merged(tmp_path, [LoraSource(tmp_path / "lora.safetensors", 0.7)])
    expected = base_weights()[TO_Q].double() + 0.7 * (up.double() @ down.double())
    assert sqnr(expected, out[TO_Q]) > 40
    assert sqnr(base_weights()[TO_Q], out[TO_Q]) < 30


@pytest.mark.parametrize(
    "where", ["tensor", "header", "header_underscore", "network", "adapter_config", "rslora", "none"]
)
def test_alpha_is_found_where_the_file_keeps_it(tmp_path: Path, where: str) -> None:
    down, up = halves(32, 24)
    layer = "lora_unet_blocks_0_attn_to_q"
    tensors, metadata, file = {}, {}, tmp_path / "lora.safetensors"
    alpha = 2.0
    if where == "tensor":
        tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    elif where == "header":
        metadata[f"{layer}.alpha"] = "2.0"
    elif where == "header_underscore":
        metadata[f"{layer}_alpha"] = "2.0"
    elif where == "network":
        metadata["ss_network_alpha"] = "2.0"
    elif where in ("adapter_config", "rslora"):
        file = tmp_path / "adapter_model.safetensors"
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({"lora_alpha": 2, "use_rslora": where == "rslora"})
        )
        alpha = 4.0 if where == "rslora" else 2.0
    else:
        alpha = 4.0
    save_file({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, **tensors}, file, metadata)
    (data,) = load_lora_for_merging(file).values()
    assert (data["alpha"], data["rank"]) == (alpha, 4)
    out = merged(tmp_path, [LoraSource(file)])
    expected = base_weights()[TO_Q] + alpha / 4 * (up @ down)
    assert sqnr(expected, out[TO_Q]) > 40


def test_convolutions(tmp_path: Path) -> None:
    conv_down, conv_up = torch.randn(4, 8, 3, 3), torch.randn(16, 4, 1, 1)
    down, up = halves(16, 8)
    tensors = {
        "lora_unet_blocks_0_conv.lora_down.weight": conv_down, "lora_unet_blocks_0_conv.lora_up.weight": conv_up,
        "lora_unet_blocks_0_proj_in.lora_down.weight": down[..., None, None],
        "lora_unet_blocks_0_proj_in.lora_up.weight": up[..., None, None],
    }  # fmt: skip
    save_file(tensors, tmp_path / "lora.safetensors")
    out = merged(tmp_path, [LoraSource(tmp_path / "lora.safetensors")])
    base = base_weights()
    # A convolution with the merged kernel is the base's plus the two halves one after the other.
    x = torch.randn(1, 8, 6, 6)
    expected = torch.conv2d(x, base["model.diffusion_model.blocks.0.conv.weight"]) + torch.conv2d(
        torch.conv2d(x, conv_down), conv_up
    )
    assert torch.allclose(
        torch.conv2d(x, out["model.diffusion_model.blocks.0.conv.weight"]), expected, atol=1e-3
    )
    name = "model.diffusion_model.blocks.0.proj_in.weight"
    assert torch.allclose(out[name][..., 0, 0], base[name][..., 0, 0] + up @ down, atol=1e-6)


@pytest.mark.parametrize("dampen", [True, False])
def test_several_loras_are_dampened_once(tmp_path: Path, dampen: bool) -> None:
    sources, expected = [], base_weights()[TO_Q].double()
    configs = []
    for index, scale in enumerate((1.0, 0.5, 2.0)):
        down, up = halves(32, 24, seed=index)
        names = NAMES["kohya"]
        save_file({names[0]: down, names[1]: up}, tmp_path / f"lora{index}.safetensors")
        sources.append(LoraSource(tmp_path / f"lora{index}.safetensors", scale))
        configs.append({"lora_A": down, "lora_B": up, "alpha": 4, "rank": 4, "scale": scale})
        expected = expected + scale * ((0.9**index) if dampen else 1) * (up.double() @ down.double())
    out = merged(tmp_path, sources, dampen_loras=dampen)
    assert sqnr(expected, out[TO_Q]) > 40
    direct = merge_multiple_loras(base_weights()[TO_Q], configs, dampen)
    assert torch.allclose(direct.double(), expected, atol=1e-5)


def test_merging_keeps_dtype_and_leaves_the_weight_alone() -> None:
    weight = base_weights(torch.bfloat16)[TO_Q]
    before = weight.clone()
    down, up = halves(32, 24)
    out = merge_lora_into_weight(weight, down, up, 8.0, 4, scale=0.5)
    assert out.dtype == torch.bfloat16
    assert torch.equal(weight, before)
    assert torch.equal(out, (weight.float() + (up @ down)).bfloat16())
    with pytest.raises(ValidationError, match="does not fit"):
        merge_lora_into_weight(weight, down[:, :5], up, None, 4)


def test_unmatched_layers_are_listed_unless_allowed(tmp_path: Path) -> None:
    down, up = halves(32, 24)
    names = NAMES["kohya"]
    tensors = {names[0]: down, names[1]: up}
    tensors |= {
        "lora_te_layers_9.lora_down.weight": down.clone(),
        "lora_te_layers_9.lora_up.weight": up.clone(),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValidationError, match="lora_te_layers_9"):
        merged(tmp_path, [LoraSource(tmp_path / "lora.safetensors")])
    out = merged(tmp_path, [LoraSource(tmp_path / "lora.safetensors")], allow_unmatched_loras=True)
    assert sqnr(base_weights()[TO_Q] + up @ down, out[TO_Q]) > 40


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"x.lora_down.weight": torch.ones(4, 24)}, "partner"),
        ({"x.lora_up.weight": torch.ones(4, 24), "y.lora_down.weight": torch.ones(1, 1), "y.lora_up.weight": torch.ones(1, 1)}, "x.lora_up"),
        ({"x.hada_w1_a": torch.ones(4, 24)}, "not plain LoRA"),
        ({"x.weight": torch.ones(4, 24)}, "no LoRA layers"),
        ({"lora_unet_blocks_0_attn_to_q.lora_down.weight": torch.ones(4, 7),
          "lora_unet_blocks_0_attn_to_q.lora_up.weight": torch.ones(32, 4)}, "does not fit"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_merged_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], named: str
) -> None:
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValidationError, match=named):
        merged(tmp_path, [LoraSource(tmp_path / "lora.safetensors")])


def test_merges_do_not_depend_on_workers(tmp_path: Path) -> None:
    down, up = halves(32, 24)
    save_file({NAMES["kohya"][0]: down, NAMES["kohya"][1]: up}, tmp_path / "lora.safetensors")
    save_file(base_weights(), tmp_path / "base.safetensors")
    written = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}.safetensors"
        run(
            tmp_path / "base.safetensors",
            out,
            workers=workers,
            loras=(LoraSource(tmp_path / "lora.safetensors"),),
        )
        written.append(out.read_bytes())
    assert written[0] == written[1]


def stable_diffusion_shapes() -> dict[str, tuple[int, ...]]:
    """The attention layers of Stable Diffusion 1's U-Net, as diffusers names them."""
    places = [(f"down_blocks.{b}.attentions.{a}", 320 * 2**b) for b in range(3) for a in range(2)]
    places += [(f"up_blocks.{b}.attentions.{a}", 1280 // 2 ** (b - 1)) for b in range(1, 4) for a in range(3)]
    places += [("mid_block.attentions.0", 1280)]
    shapes: dict[str, tuple[int, ...]] = {}
    for place, width in places:
        block = f"{place}.transformer_blocks.0"
        for attention, into in (("attn1", width), ("attn2", 768)):
            shapes[f"{block}.{attention}.to_q.weight"] = (width, width)
            shapes[f"{block}.{attention}.to_k.weight"] = (width, into)
            shapes[f"{block}.{attention}.to_v.weight"] = (width, into)
            shapes[f"{block}.{attention}.to_out.0.weight"] = (width, width)
        shapes[f"{block}.ff.net.0.proj.weight"] = (8 * width, width)
    return shapes


@pytest.mark.parametrize("file", ["cloneofsimo_analog_svd_rank4", "cloneofsimo_lora_disney"])
def test_numbered_layers_find_stable_diffusion(file: str) -> None:
    path = DATA / "lora" / f"{file}.safetensors"
    if not path.exists():
        pytest.skip("the LoRA files are not here")
    shapes = stable_diffusion_shapes()
    clip = {
        f"text_model.encoder.layers.{layer}.self_attn.{part}.weight": (768, 768)
        for layer in range(12)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    terms, skipped = plan_merges([LoraSource(path, 0.5)], shapes | clip, dampen=True, allow_unmatched=False)
    assert not skipped
    assert len(terms) == 144 + 48
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    (term,) = terms[name]
    tensors = load_file(path)
    weight = torch.zeros(320, 768)
    term.add_rows(weight, 0, 320)
    assert torch.allclose(weight, 0.5 * tensors[term.up].float() @ tensors[term.down].float(), atol=1e-7)
    assert len(load_lora_tensors(path)) == 144 + 48


def test_low_rank_halves_are_read_for_guidance(tmp_path: Path) -> None:
    down, up = halves(32, 24)
    save_file({NAMES["kohya"][0]: down, NAMES["kohya"][1]: up}, tmp_path / "lora.safetensors")
    ((name, found),) = load_lora_tensors(tmp_path / "lora.safetensors").items()
    assert name == "lora_unet_blocks_0_attn_to_q"
    assert torch.equal(found, down)
    with UnifiedSafetensorsLoader(tmp_path / "lora.safetensors") as loader:
        assert len(loader.keys()) == 2
