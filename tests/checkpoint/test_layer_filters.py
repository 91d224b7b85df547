from __future__ import annotations

import inspect

import pytest

from qwodel.checkpoint.families.layer_filters import (
    AVOID_KEY_NAMES,
    MODEL_FILTERS,
    T5XXL_REMOVE_KEY_NAMES,
    filter_verdict,
    matches,
    should_process_layer,
    validate_filters,
)
from qwodel.checkpoint.families.model_family import detect_family
from qwodel.exceptions import ConfigurationError


@pytest.mark.parametrize(
    ("pattern", "key", "expected"),
    [
        ("norm", "blocks.3.norm1.weight", True),
        ("norm", "model.layers.0.input_layernorm.weight", True),
        ("norm", "attn.q_norm.weight", True),
        ("norm", "norm_out.linear.weight", False),
        ("norm", "blocks.0.normalizer_proj.weight", False),
        ("shared", "shared.weight", True),
        ("shared", "model.layers.0.mlp.shared_expert.up_proj.weight", False),
        ("bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", True),
        ("bias", "unbiased_proj.weight", False),
        ("img_in", "img_in.weight", True),
        ("img_in", "swimg_inner.weight", False),
        ("las*", "last.linear.weight", True),
        ("las*", "classes.proj.weight", False),
        ("mlp.gate.", "model.layers.1.mlp.gate.weight", True),
        ("mlp.gate.", "model.layers.1.mlp.gate_proj.weight", False),
        ("_attn.proj", "double_blocks.0.img_attn.proj.weight", True),
        ("blocks.1", "blocks.1.attn.weight", True),
        ("blocks.1", "blocks.15.attn.weight", False),
        ("img_mod.1", "transformer_blocks.0.img_mod.1.weight", True),
        ("img_mod.1", "transformer_blocks.0.img_mod.12.weight", False),
        ("__x0__", "__x0__", True),
    ],
)
def test_patterns_match_words_not_substrings(pattern: str, key: str, expected: bool) -> None:
    assert matches(pattern, key) is expected


@pytest.mark.parametrize("name", ["t5xxl", "mistral", "visual", "flux2", "distillation_large", "distillation_small",
                                  "nerf_large", "nerf_small", "radiance", "wan", "hunyuan", "qwen", "zimage",
                                  "zimage_refiner", "lora", "gemma4", "qwen_vlm", "qwen35", "anima", "lens", "krea2",
                                  "ideogram4", "minimaxh3", "boogu", "ltxv2", "generic_text"])  # fmt: skip
def test_registry_is_complete(name: str) -> None:
    assert MODEL_FILTERS[name].description


def test_constants_are_what_the_filters_use() -> None:
    assert MODEL_FILTERS["t5xxl"].exclude == AVOID_KEY_NAMES
    assert MODEL_FILTERS["t5xxl"].remove == T5XXL_REMOVE_KEY_NAMES


def test_signature_of_should_process_layer() -> None:
    assert list(inspect.signature(should_process_layer).parameters) == [
        "key", "t5xxl", "keep_distillation_large", "keep_distillation_small", "keep_nerf_large", "keep_nerf_small",
        "radiance", "wan", "qwen", "hunyuan", "zimage_l", "zimage_s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "flags", "expected"),
    [
        ("encoder.block.0.layer.0.SelfAttention.q.weight", {"t5xxl": True}, (True, True)),
        ("decoder.block.0.layer.0.SelfAttention.q.weight", {"t5xxl": True}, (False, False)),
        ("shared.weight", {"t5xxl": True}, (False, False)),
        ("lm_head.weight", {}, (False, False)),
        ("model.embed_tokens.weight", {}, (False, False)),
        ("final_layer.linear.weight", {"keep_distillation_large": True}, (False, True)),
        ("final_layer.linear.weight", {}, (True, True)),
        ("transformer_blocks.0.img_mod.1.weight", {"qwen": True}, (False, True)),
        ("transformer_blocks.1.img_mod.1.weight", {"qwen": True}, (True, True)),
        ("context_refiner.0.attention.qkv.weight", {"zimage_l": True}, (False, True)),
        ("context_refiner.0.attention.qkv.weight", {"zimage_s": True}, (True, True)),
        ("blocks.0.attn.q.bias", {}, (False, False)),
    ],
)
def test_should_process_layer(key: str, flags: dict[str, bool], expected: tuple[bool, bool]) -> None:
    process, create_scale, reason = should_process_layer(key, **flags)
    assert (process, create_scale) == expected
    assert reason


def test_removal_wins_over_keeping() -> None:
    assert filter_verdict("decoder.embed_tokens.weight", ("t5xxl",)).action == "remove"


def test_unknown_filter_names_the_nearest() -> None:
    with pytest.raises(ConfigurationError) as caught:
        validate_filters({"hunyan": True})
    assert "hunyuan" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("flux", ["double_blocks.0.img_attn.proj.weight", "single_blocks.0.linear1.weight", "guidance_in.in_layer.weight"]),
        ("flux", ["single_transformer_blocks.0.attn.to_q.weight", "context_embedder.weight"]),
        ("flux2", ["double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight"]),
        ("chroma", ["distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"]),
        ("chroma-radiance", ["distilled_guidance_layer.in_proj.weight", "nerf_blocks.0.param_generator.weight"]),
        ("sd3", ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"]),
        ("qwen-image", ["transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"]),
        ("wan", ["blocks.0.self_attn.q.weight", "time_projection.1.weight"]),
        ("hunyuan", ["txt_in.individual_token_refiner.blocks.0.mlp.fc1.weight", "double_blocks.0.img_attn.qkv.weight"]),
        ("zimage", ["cap_embedder.0.weight", "noise_refiner.0.attention.qkv.weight"]),
        ("t5xxl", ["encoder.block.0.layer.0.SelfAttention.q.weight",
                   "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]),
        ("mistral", ["tekken_model", "model.layers.0.self_attn.q_proj.weight"]),
        ("llm", ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]),
        ("llm", ["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"]),
        ("sd-unet", ["down_blocks.0.attentions.0.proj_in.weight", "up_blocks.0.attentions.0.proj_in.weight"]),
        ("unknown", ["layers.weight"]),
    ],
)  # fmt: skip
def test_family_is_detected_with_evidence(family: str, keys: list[str]) -> None:
    found = detect_family(keys)
    assert found.name == family
    assert set(found.evidence) <= set(keys)
    assert bool(found.evidence) == (family != "unknown")
    assert all(name in MODEL_FILTERS for name in found.filters)
