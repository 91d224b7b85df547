"""Tiny random models of many architectures, saved as their owners would save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 8}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
    "phi": ("PhiForCausalLM", "PhiConfig", {}),
    "bert": ("BertForMaskedLM", "BertConfig", {}),
    "roberta": ("RobertaModel", "RobertaConfig", {}),
    "albert": ("AlbertModel", "AlbertConfig", {"embedding_size": 16, "num_hidden_layers": 3}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
}


def make(name: str, seed: int = 0) -> Any:
    """A random model whose inputs differ enough between channels for data to matter."""
    model_class, config_class, extra = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**_SMALL | extra)
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def save(name: str, folder: Path, seed: int = 0) -> Any:
    """Save a tiny model into ``folder`` and return it."""
    model = make(name, seed)
    model.save_pretrained(folder)
    return model


def batches(name: str, count: int = 3, length: int = 20) -> list[dict[str, torch.Tensor]]:
    """Token batches as keyword arguments of the model's forward pass."""
    generator = torch.Generator().manual_seed(7)
    result = []
    for _ in range(count):
        tokens = torch.randint(3, 96, (2, length), generator=generator)
        result.append({"input_ids": tokens} | ({"decoder_input_ids": tokens} if name == "t5" else {}))
    return result
