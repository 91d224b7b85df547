"""Recognising a model's family from the names of its tensors, with the evidence.

Each family is described by names that occur together in its checkpoints and in
no other family's. The most specific families come first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["FAMILIES", "Family", "ModelFamily", "detect_family"]


@dataclass(frozen=True, slots=True)
class Family:
    """One family: every one of ``signature`` (regular expressions) must occur among the keys."""

    name: str
    filters: tuple[str, ...]
    signature: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """What was recognised.

    Attributes:
        name: such as ``"flux"``; ``"unknown"`` when nothing fits.
        filters: the names in ``MODEL_FILTERS`` that suit it.
        evidence: one key per signature that gave it away.
    """

    name: str
    filters: tuple[str, ...]
    evidence: tuple[str, ...]

    def __str__(self) -> str:
        if not self.evidence:
            return f"{self.name}: norms, embeddings, heads and biases are kept"
        return f"{self.name} (seen: {', '.join(self.evidence)}; filters: {', '.join(self.filters) or 'safe default'})"


FAMILIES: tuple[Family, ...] = (
    Family("chroma-radiance", ("nerf_small", "radiance", "distillation_large"),
           (r"(^|\.)nerf_blocks\.", r"(^|\.)distilled_guidance_layer\.")),
    Family("chroma", ("distillation_large",),
           (r"(^|\.)distilled_guidance_layer\.", r"(^|\.)(double_blocks|transformer_blocks)\.\d+\.")),
    Family("flux2", ("flux2",), (r"(^|\.)double_stream_modulation_img\.", r"(^|\.|_)(single|double|transformer)_?.*blocks\.\d+\.")),
    Family("hunyuan", ("hunyuan",), (r"(^|\.)double_blocks\.\d+\.img_attn_(qkv|q_norm)",)),
    Family("hunyuan", ("hunyuan",), (r"(^|\.)txt_in\.individual_token_refiner\.",)),
    Family("hunyuan", ("hunyuan",), (r"(^|\.)(vision_in\.proj|cond_type_embedding)", r"(^|\.)double_blocks\.\d+\.")),
    Family("flux", ("flux",), (r"(^|\.)double_blocks\.\d+\.img_attn\.", r"(^|\.)single_blocks\.\d+\.linear1\.")),
    Family("flux", ("flux",), (r"(^|\.)single_transformer_blocks\.\d+\.", r"(^|\.)context_embedder\.")),
    Family("sd3", ("sd3",), (r"(^|\.)joint_blocks\.\d+\.(x_block|context_block)\.",)),
    Family("qwen-image", ("qwen",), (r"(^|\.)transformer_blocks\.\d+\.img_mod\.1\.", r"(^|\.)txt_norm\.")),
    Family("sd3", ("sd3",), (r"(^|\.)transformer_blocks\.\d+\.attn\.add_q_proj\.", r"(^|\.)pos_embed\.")),
    Family("zimage", ("zimage",), (r"(^|\.)cap_embedder\.", r"(^|\.)(noise|context)_refiner\.\d+\.")),
    Family("wan", ("wan",), (r"(^|\.)blocks\.\d+\.(self_attn|cross_attn)\.q\.", r"(^|\.)(time_projection|text_embedding)\.")),
    Family("wan", ("wan",), (r"(^|\.)condition_embedder\.time_embedder\.", r"(^|\.)blocks\.\d+\.attn1\.to_q\.")),
    Family("ltxv2", ("ltxv2",), (r"(^|\.)patchify_proj\.", r"(^|\.)audio_patchify_proj\.")),
    Family("ltxv2", ("ltxv2",), (r"(^|\.)(patchify_proj|proj_in)\.", r"(^|\.)adaln_single\.", r"scale_shift_table$")),
    Family("sd-unet", ("sd_unet",), (r"(^|\.)(input_blocks|down_blocks)\.\d+\.", r"(^|\.)(output_blocks|up_blocks)\.\d+\.")),
    Family("t5xxl", ("t5xxl",), (r"(^|\.)encoder\.block\.\d+\.layer\.\d+\.SelfAttention\.q\.", r"relative_attention_bias\.")),
    Family("mistral", ("mistral",), (r"(^|\.)tekken_model$",)),
    Family("mistral", ("mistral",), (r"(^|\.)multi_modal_projector\.", r"(^|\.)patch_conv\.")),
    Family("gemma4", ("gemma4",), (r"\.per_layer_input_gate\.", r"\.per_layer_projection\.")),
    Family("qwen-vlm", ("qwen_vlm",), (r"(^|\.)visual\.(blocks|merger)\.", r"\.layers\.\d+\.(self_attn|linear_attn)\.")),
    Family("clip-text", ("generic_text",), (r"(^|\.)text_model\.encoder\.layers\.\d+\.self_attn\.",)),
    Family("llm", ("generic_text",), (r"(^|\.)layers\.\d+\.(self_attn|linear_attn|attention|mixer)\.", r"(^|\.)(embed_tokens|tok_embeddings|embeddings?)\.")),
    Family("llm", ("generic_text",), (r"(^|\.)h\.\d+\.(attn|self_attention)\.", r"(^|\.)(wte|word_embeddings)\.")),
    Family("llm", ("generic_text",), (r"(^|\.)encoder\.layer\.\d+\.attention\.self\.", r"(^|\.)embeddings\.word_embeddings\.")),
)  # fmt: skip
"""Known families, tried in this order."""


def detect_family(keys: Iterable[str]) -> ModelFamily:
    """Return the first family of :data:`FAMILIES` all of whose signatures occur in ``keys``."""
    names = list(keys)
    for family in FAMILIES:
        evidence = [_first_match(signature, names) for signature in family.signature]
        if all(evidence):
            return ModelFamily(family.name, family.filters, tuple(key for key in evidence if key))
    return ModelFamily("unknown", (), ())


def _first_match(signature: str, keys: list[str]) -> str | None:
    pattern = re.compile(signature)
    return next((key for key in keys if pattern.search(key)), None)
