"""Tiny random models with a tokenizer, saved as directories."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 96
_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "Llama": _SMALL,
    "Gemma": {**_SMALL, "head_dim": 16},
    "StableLm": _SMALL,
    "OPT": {**_SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "Qwen3Moe": {
        **_SMALL, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 1,
    },
    "GPT2": {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64},
}  # fmt: skip


def tiny_model(kind: str, folder: Path, *, tokenizer: bool = True, **changes: Any) -> Path:
    """Save a random model of a class and return its directory; same arguments, same weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SETTINGS[kind], **changes})
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)  # random models are nearly constant functions otherwise
    path = folder / f"tiny-{kind.lower()}"
    model.save_pretrained(path)
    if tokenizer:
        word_tokenizer().save_pretrained(path)
    (path / "LICENSE").write_text("a licence\n")
    return path


def word_tokenizer() -> Any:
    """A tokenizer where ``w7`` is token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, "w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w2")


def write_jsonl(path: Path, records: int = 60) -> Path:
    """Write records of random words under ``text``."""
    generator = random.Random(0)
    lines = [
        json.dumps({"text": " ".join(f"w{generator.randrange(4, VOCABULARY)}" for _ in range(30))})
        for _ in range(records)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
