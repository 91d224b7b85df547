"""Seams of stock diffusers and transformers models, counted from their source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qwodel.modeling.patterns import Patterns, SegPattern, find, find_patterns

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CHUNK, SPLIT = SegPattern.LINEAR2CHUNK, SegPattern.LINEAR2SPLIT
CONCAT, STACK, RESHAPE = SegPattern.CONCAT2LINEAR, SegPattern.STACK2LINEAR, SegPattern.RESHAPE2LINEAR
ACTIVATION = SegPattern.ACTIVATION2LINEAR

Case = tuple[nn.Module, dict[str, Any], dict[SegPattern, int]]


def _tokens(channels: int, count: int = 5) -> torch.Tensor:
    return torch.randn(2, count, channels)


def _sd3() -> Case:
    blocks, heads, size = 3, 4, 8
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=blocks,
        attention_head_dim=size, num_attention_heads=heads, caption_projection_dim=heads * size,
        joint_attention_dim=16, pooled_projection_dim=12, pos_embed_max_size=8,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": _tokens(16),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.tensor([3.0, 3.0]),
    }
    expected = {
        # norm1 (6 parts) and norm1_context (6; 2 in the last block) of each block, norm_out (2)
        CHUNK: 2 * blocks + 1,
        # sine and cosine of the timestep
        CONCAT: 1,
        # heads into to_out of each block, and to_add_out of all but the last
        RESHAPE: 2 * blocks - 1,
        # each chunked layer reads silu; ff and ff_context (not of the last block) gelu;
        # the second layers of the timestep and text embedders silu
        ACTIVATION: (2 * blocks + 1) + (2 * blocks - 1) + 2,
    }
    return model, inputs, expected


def _flux() -> Case:
    double, single = 2, 3
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=double, num_single_layers=single, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=12, guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = {
        "hidden_states": _tokens(4, 16),
        "encoder_hidden_states": _tokens(16),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.tensor([0.3, 0.3]),
        "guidance": torch.ones(2),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    expected = {
        # norm1 and norm1_context (6 parts) of double blocks, norm (3) of single ones, norm_out (2)
        CHUNK: 2 * double + single + 1,
        # attention beside the MLP in single blocks; sine and cosine of timestep and guidance
        CONCAT: single + 2,
        # to_out and to_add_out of double blocks; the attention half of the single blocks' proj_out
        RESHAPE: 2 * double + single,
        # chunked layers read silu, ff and ff_context gelu, proj_out gelu in its MLP half,
        # and the second layers of three embedders silu
        ACTIVATION: (2 * double + single + 1) + 2 * double + single + 3,
    }
    return model, inputs, expected


def _sdxl() -> Case:
    depth = (1, 2)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=depth,
        attention_head_dim=(2, 4), use_linear_projection=True, cross_attention_dim=64,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )  # fmt: skip
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": _tokens(64),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 32), "time_ids": torch.randn(2, 6)},
    }
    # transformers: one going down, one in the middle, two (layers_per_block + 1) going up
    blocks = depth[1] * (1 + 1 + 2)
    resnets = 2 * 1 + 2 + 2 * 2  # down, middle, up
    expected = {
        # the GEGLU of each block
        CHUNK: blocks,
        # sine and cosine of the timestep; pooled text beside the time ids
        CONCAT: 2,
        # heads into attn1.to_out and attn2.to_out; six time ids into one row
        RESHAPE: 2 * blocks + 1,
        # GEGLU into net.2; silu into each resnet's time_emb_proj and two embedders' second layers
        ACTIVATION: blocks + resnets + 2,
    }
    return model, inputs, expected


def _wan() -> Case:
    blocks = 3
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=blocks, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "timestep": torch.tensor([3, 3]),
        "encoder_hidden_states": _tokens(16),
    }
    expected = {
        # time_proj, its six parts taken in every block after a table is added
        CHUNK: 1,
        # sine and cosine of the timestep
        CONCAT: 1,
        # attn1.to_out and attn2.to_out
        RESHAPE: 2 * blocks,
        # gelu in each ffn and in the text embedder, silu before time_proj and in the time embedder
        ACTIVATION: blocks + 3,
    }
    return model, inputs, expected


def _pixart() -> Case:
    blocks = 2
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=blocks, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8, cross_attention_dim=16, caption_channels=24,
        use_additional_conditions=False,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": _tokens(24),
        "timestep": torch.tensor([3, 3]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    expected = {
        # adaln_single.linear, cut in every block after a table is added
        CHUNK: 1,
        CONCAT: 1,  # sine and cosine
        RESHAPE: 2 * blocks,  # attn1 and attn2
        # gelu in each ff and in caption_projection, silu before adaln_single and in its embedder
        ACTIVATION: blocks + 3,
    }
    return model, inputs, expected


def _dit() -> Case:
    blocks = 2
    model = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=blocks, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 3]),
        "class_labels": torch.tensor([1, 2]),
    }
    expected = {
        CHUNK: blocks + 1,  # norm1 of each block (6), proj_out_1 (2)
        CONCAT: blocks,  # each block has a timestep embedder of its own
        RESHAPE: blocks,
        # norm1, its embedder and the ff of each block; proj_out_1
        ACTIVATION: 3 * blocks + 1,
    }
    return model, inputs, expected


def _llama() -> Case:
    layers = 3
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=1,
    )  # fmt: skip
    inputs = {"input_ids": torch.randint(96, (2, 7)), "use_cache": False}
    # heads into o_proj, SwiGLU into down_proj; rotary halves are read across and are no seam
    return transformers.LlamaForCausalLM(config), inputs, {RESHAPE: layers, ACTIVATION: layers}


MODELS: dict[str, Callable[[], Case]] = {
    "SD3": _sd3, "Flux": _flux, "SDXL": _sdxl, "Wan": _wan, "PixArt": _pixart, "DiT": _dit, "Llama": _llama,
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def found(request: pytest.FixtureRequest) -> tuple[str, Case, Patterns]:
    torch.manual_seed(0)
    case = MODELS[request.param]()
    return request.param, case, find_patterns(case[0], case[1])


def test_counts(found: tuple[str, Case, Patterns]) -> None:
    _, (model, _, expected), patterns = found
    assert patterns.method == "torch.export"
    assert Counter(each.pattern for each in patterns.findings) == expected
    modules = dict(model.named_modules())
    layers = {
        name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
    }
    assert set(patterns.order) == layers
    assert all(sum(sizes) == modules[name].out_features for name, sizes in patterns.output_segments().items())
    assert all(sum(sizes) == modules[name].in_features for name, sizes in patterns.input_segments().items())


def test_a_run_finds_what_the_exported_graph_has(
    found: tuple[str, Case, Patterns], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (model, inputs, _), patterns = found
    monkeypatch.setattr(find, "_METHODS", {"hooks": find._METHODS["hooks"]})
    recorded = find_patterns(model, ((), inputs))
    assert recorded.method == "hooks"
    assert recorded.order == patterns.order
    assert recorded.output_segments() == patterns.output_segments()
    assert recorded.input_segments() == patterns.input_segments()
    assert recorded.activations() == patterns.activations()


SEGMENTS = {
    "SD3": ("outputs", "transformer_blocks.2.norm1_context.linear", (32, 32)),
    "Flux": ("inputs", "single_transformer_blocks.1.proj_out", (16, 16, 128)),
    "SDXL": ("inputs", "add_embedding.linear_1", (32, 8, 8, 8, 8, 8, 8)),
    "Wan": ("outputs", "condition_embedder.time_proj", (24,) * 6),
    "PixArt": ("outputs", "adaln_single.linear", (16,) * 6),
    "DiT": ("outputs", "proj_out_1", (16, 16)),
    "Llama": ("inputs", "model.layers.2.self_attn.o_proj", (8,) * 4),
}
ACTIVATIONS = {
    "SD3": ("transformer_blocks.0.ff.net.2", "gelu"),
    "Flux": ("single_transformer_blocks.1.proj_out", "gelu (inputs 32 to 159)"),
    "SDXL": ("mid_block.attentions.0.transformer_blocks.1.ff.net.2", "geglu"),
    "Wan": ("condition_embedder.time_proj", "silu"),
    "PixArt": ("caption_projection.linear_2", "gelu"),
    "DiT": ("transformer_blocks.1.norm1.linear", "silu"),
    "Llama": ("model.layers.0.mlp.down_proj", "swiglu"),
}


def test_segments_and_activations(found: tuple[str, Case, Patterns]) -> None:
    name, _, patterns = found
    side, layer, sizes = SEGMENTS[name]
    segments = patterns.output_segments() if side == "outputs" else patterns.input_segments()
    assert segments[layer] == sizes
    layer, activation = ACTIVATIONS[name]
    assert patterns.activations()[layer] == activation
