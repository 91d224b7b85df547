"""Which layers of which model family stay in high precision: names and patterns, no logic.

Patterns match whole words of a key, words being what stands between ``.`` and
``_``: ``img_in`` matches ``img_in.weight`` and ``img_in_patch``, not
``swimg_inner``. Trailing digits belong to the word (``norm1``) unless the
pattern itself ends in a digit; a pattern that ends in ``.`` ends with a whole
component (``mlp.gate.`` is not ``mlp.gate_proj``). ``*`` stands for any characters inside one
component. :mod:`qwodel.checkpoint.families.layer_filters` does the matching.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "AVOID_KEY_NAMES",
    "DISTILL_LAYER_KEYNAMES_LARGE",
    "DISTILL_LAYER_KEYNAMES_SMALL",
    "HUNYUAN_AVOID_KEY_NAMES",
    "MODEL_FILTERS",
    "NERF_LAYER_KEYNAMES_LARGE",
    "NERF_LAYER_KEYNAMES_SMALL",
    "QWEN_AVOID_KEY_NAMES",
    "QWEN_LAYER_KEYNAMES",
    "RADIANCE_LAYER_KEYNAMES",
    "SAFE_KEY_NAMES",
    "T5XXL_REMOVE_KEY_NAMES",
    "WAN_LAYER_KEYNAMES",
    "ZIMAGE_AVOID_KEY_NAMES",
    "ZIMAGE_LAYER_KEYNAMES",
    "ModelFilter",
]

SAFE_KEY_NAMES: tuple[str, ...] = (
    "norm", "bias", "embed_tokens", "lm_head", "shared", "embed", "embeds", "embedding", "embeddings",
    "word_embeddings", "wte", "wpe", "embed_in", "embed_out", "output_head", "score", "classifier", "pooler",
    "router", "mlp.gate.", "block_sparse_moe.gate.", "moe.gate.", "ffn.gate_inp.", "shared_expert_gate.",
)  # fmt: skip
"""Kept whatever the family: norms, biases, embeddings, output heads and expert routers."""

AVOID_KEY_NAMES: tuple[str, ...] = (
    "norm", "bias", "embed_tokens", "lm_head", "shared", "patch_embedding", "audio_model.patch_embedding",
    "ref_conv", "control_adapter", "motion_encoder.enc.net_app", "face_encoder.conv", "pose_patch_embedding",
    "motion_encoder.enc.fc", "img_emb.proj", "k_norm", "q_norm", "motion_encoder.dec", "head.modulation",
    "casual_audio_encoder", "cond_encoder", "frame_packer", "norm_k", "norm_q", "tekken_model",
    "multi_modal_projector", "patch_conv", "ln_pre", "input_layernorm", "attention_norm",
    "post_attention_layernorm", "mm_input_projection_weight",
)  # fmt: skip
"""Layers no text encoder or video model wants quantized."""

T5XXL_REMOVE_KEY_NAMES: tuple[str, ...] = ("decoder", "lm_head")
"""What a T5 text encoder never runs."""

HUNYUAN_AVOID_KEY_NAMES: tuple[str, ...] = (
    "layernorm", "img_attn_k_norm", "img_attn_q_norm", "txt_attn_k_norm", "txt_attn_q_norm", "norm1", "norm2",
    "vision_in.proj.0", "vision_in.proj.4", "img_in.proj", "cond_type_embedding",
)  # fmt: skip
QWEN_AVOID_KEY_NAMES: tuple[str, ...] = ("norm_added_k", "norm_added_q", "norm_k", "norm_q", "txt_norm")
ZIMAGE_AVOID_KEY_NAMES: tuple[str, ...] = (
    "cap_embedder.0", "cap_pad_token", "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "k_norm",
    "q_norm", "x_pad_token", "norm", "bias",
)  # fmt: skip

DISTILL_LAYER_KEYNAMES_LARGE: tuple[str, ...] = (
    "distilled_guidance_layer",
    "final_layer",
    "img_in",
    "txt_in",
)
DISTILL_LAYER_KEYNAMES_SMALL: tuple[str, ...] = ("distilled_guidance_layer",)
NERF_LAYER_KEYNAMES_LARGE: tuple[str, ...] = (
    "distilled_guidance_layer", "nerf_blocks", "nerf_image_embedder", "txt_in", "_attn.proj",
)  # fmt: skip
NERF_LAYER_KEYNAMES_SMALL: tuple[str, ...] = (
    "distilled_guidance_layer",
    "nerf_blocks",
    "nerf_image_embedder",
)
RADIANCE_LAYER_KEYNAMES: tuple[str, ...] = ("img_in_patch", "nerf_final_layer_conv", "__x0__")
WAN_LAYER_KEYNAMES: tuple[str, ...] = (
    "text_embedding", "time_embedding", "audio_model.text_embedding", "casual_audio_encoder", "frame_packer",
    "trainable_cond_mask", "cond_encoder", "audio_model.time_embedding", "time_projection",
    "video_model.time_projection", "head.head", "face_encoder.out_proj", "face_adapter", "audio_injector",
)  # fmt: skip
QWEN_LAYER_KEYNAMES: tuple[str, ...] = (
    "time_text_embed", "img_in", "norm_out", "proj_out", "transformer_blocks.0.img_mod.1", "txt_in",
)  # fmt: skip
ZIMAGE_LAYER_KEYNAMES: tuple[str, ...] = (
    "x_embedder", "clip_text_pooled_proj", "final_layer", "cap_embedder.1", "adaLN_modulation", "t_embedder",
    "time_text_embed", "pos_embed", "proj_out",
)  # fmt: skip
_FLUX_LAYERS = ("guidance_in", "time_in", "vector_in", "final_layer", "img_in", "txt_in")
_FLUX_DIFFUSERS = ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")


@dataclass(frozen=True, slots=True)
class ModelFilter:
    """What one family keeps and what it drops.

    Attributes:
        description: the family in words.
        exclude: kept because they are not matrix products, or lose too much.
        highprec: kept because they are small and steer the whole model.
        remove: dropped from the output.
    """

    description: str
    exclude: tuple[str, ...] = ()
    highprec: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()


_ZIMAGE = ModelFilter("Z-Image", ZIMAGE_AVOID_KEY_NAMES, ZIMAGE_LAYER_KEYNAMES)
_QWEN_VLM = ModelFilter(
    "Qwen vision-language models",
    exclude=("layers.0", "lm_head", "embed_tokens", "in_proj_a", "in_proj_b", "visual", "mtp"),
)

MODEL_FILTERS: Mapping[str, ModelFilter] = MappingProxyType(
    {
        "t5xxl": ModelFilter("T5-XXL text encoder", AVOID_KEY_NAMES, remove=T5XXL_REMOVE_KEY_NAMES),
        "mistral": ModelFilter("Mistral text encoder", AVOID_KEY_NAMES),
        "visual": ModelFilter("vision tower", ("mlp.down_proj", "mlp.up_proj", "mlp.gate_proj")),
        "flux": ModelFilter("Flux.1", highprec=_FLUX_LAYERS + _FLUX_DIFFUSERS),
        "flux2": ModelFilter(
            "Flux.2",
            highprec=("stream_modulation", "guidance_in", "time_in", "final_layer", "img_in", "txt_in"),
        ),
        "sd3": ModelFilter(
            "Stable Diffusion 3",
            AVOID_KEY_NAMES,
            ("x_embedder", "context_embedder", "t_embedder", "y_embedder", "pos_embed", "final_layer", *_FLUX_DIFFUSERS),
        ),
        "sd_unet": ModelFilter(
            "Stable Diffusion 1, 2 and XL U-Net",
            highprec=("time_embed", "time_embedding", "add_embedding", "label_emb", "emb_layers", "time_emb_proj"),
        ),
        "distillation_large": ModelFilter("Chroma, inputs and outputs kept", highprec=DISTILL_LAYER_KEYNAMES_LARGE),
        "distillation_small": ModelFilter("Chroma, guidance alone kept", highprec=DISTILL_LAYER_KEYNAMES_SMALL),
        "nerf_large": ModelFilter("Chroma Radiance, attention outputs kept", highprec=NERF_LAYER_KEYNAMES_LARGE),
        "nerf_small": ModelFilter("Chroma Radiance", highprec=NERF_LAYER_KEYNAMES_SMALL),
        "radiance": ModelFilter("Radiance pixel-space layers", highprec=RADIANCE_LAYER_KEYNAMES),
        "wan": ModelFilter("WAN video", AVOID_KEY_NAMES, WAN_LAYER_KEYNAMES),
        "hunyuan": ModelFilter("Hunyuan Video and Image", HUNYUAN_AVOID_KEY_NAMES),
        "qwen": ModelFilter("Qwen-Image", QWEN_AVOID_KEY_NAMES, QWEN_LAYER_KEYNAMES),
        "zimage": _ZIMAGE,
        "zimage_refiner": ModelFilter(
            "Z-Image with its refiners kept",
            ZIMAGE_AVOID_KEY_NAMES,
            (*ZIMAGE_LAYER_KEYNAMES, "context_refiner", "noise_refiner"),
        ),
        "lora": ModelFilter("LoRA files", ("alpha", "scale")),
        "gemma4": ModelFilter(
            "Gemma 4",
            ("audio", "per_layer_input_gate", "per_layer_projection", "vision", "multi_modal_projector"),
        ),
        "qwen_vlm": _QWEN_VLM,
        "qwen35": _QWEN_VLM,
        "anima": ModelFilter(
            "Anima",
            ("net.blocks.0", "net.blocks.1.adaln_modulation*", "final_layer", "llm_adapter", "t_embedder", "x_embedder"),
        ),
        "lens": ModelFilter(
            "Lens",
            ("time_text_embed", "img_in", "norm_out", "proj_out", "img_mod.1", "txt_mod.1", "txt_in"),
        ),
        "krea2": ModelFilter("Krea 2", ("firs*", "las*", "tml*", "txtfusion", "last.modulatio*", "tpro*")),
        "ideogram4": ModelFilter(
            "Ideogram 4",
            ("embed_image_indicator", "t_embedding", "llm_cond_proj", "adaln_proj", "final_layer", "input_proj"),
        ),
        "minimaxh3": ModelFilter(
            "MiniMax H3",
            ("audio_patch_proj", "condition_proj", "final_layer", "time_embedder", "token_refiner", "video_patch_proj"),
        ),
        "boogu": ModelFilter(
            "Boogu",
            (
                "image_index_embedding", "ref_image_patch_embedder", "time_caption_embed", "x_embedder",
                "norm_out.linear_1", "norm_out.linear_2",
            ),
        ),
        "ltxv2": ModelFilter(
            "LTX Video 2",
            (
                "scale_shift_table", "*adaln_single", "*patchify_proj", "*proj_out", "blocks.0", "blocks.1",
                "blocks.46", "blocks.47", "*connector*", "vae", "vocoder", "to_gate_logits",
            ),
        ),
        "generic_text": ModelFilter("any language model; the safe default alone"),
    }
)  # fmt: skip
"""Filter name → what it keeps and removes. Each is applied on top of :data:`SAFE_KEY_NAMES`."""
