"""The wiring of each architecture, proved on a tiny random model: scales pass, and the logits stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from qwodel.exceptions import ValidationError
from qwodel.modeling.fold import fold_scales
from qwodel.modeling.wiring import Pair, ProducerKind, find_pairs, preserves_function

_SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MOE = {**_SMALL, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_NO_GQA = {**_SMALL, "num_key_value_heads": 4}
_FALCON = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

# name: (class, configuration, pairs a layer: NORM-like, LINEAR, VALUE)
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int, int]]] = {
    "llama": ("Llama", _SMALL, (2, 1, 1)),
    "mistral": ("Mistral", _SMALL, (2, 1, 1)),
    "qwen2": ("Qwen2", _SMALL, (2, 1, 1)),
    "qwen3": ("Qwen3", {**_SMALL, "head_dim": 8}, (2, 1, 1)),
    "mixtral": ("Mixtral", {**_SMALL, "num_local_experts": 4}, (2, 0, 1)),
    "qwen2-moe": ("Qwen2Moe", {**_MOE, "shared_expert_intermediate_size": 40}, (2, 1, 1)),
    "qwen3-moe": ("Qwen3Moe", {**_MOE, "head_dim": 8}, (2, 0, 1)),
    "gemma": ("Gemma", {**_SMALL, "head_dim": 8}, (2, 1, 1)),
    "gemma2": ("Gemma2", {**_SMALL, "head_dim": 8, "query_pre_attn_scalar": 8}, (2, 1, 1)),
    "gemma3": ("Gemma3", {**_SMALL, "head_dim": 8, "query_pre_attn_scalar": 8}, (2, 1, 1)),
    "cohere": ("Cohere", _SMALL, (1, 1, 1)),
    "cohere2": ("Cohere2", _SMALL, (1, 1, 1)),
    "stablelm": ("StableLm", _SMALL, (2, 1, 1)),
    "stablelm-parallel": ("StableLm", {**_SMALL, "use_parallel_residual": True}, (1, 1, 1)),
    "phi3": ("Phi3", _SMALL, (2, 1, 1)),
    "phi2": ("Phi", _SMALL, (1, 0, 1)),
    "opt": ("OPT", {**_NO_GQA, "ffn_dim": 48, "word_embed_proj_dim": 32}, (2, 1, 1)),
    "opt-post-norm": (
        "OPT", {**_NO_GQA, "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False}, (0, 1, 1),
    ),
    "bloom": ("Bloom", {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4}, (2, 0, 0)),
    "falcon-7b": ("Falcon", {**_FALCON, "parallel_attn": True}, (1, 0, 0)),
    "falcon-rw": ("Falcon", {**_FALCON, "parallel_attn": False, "alibi": True, "multi_query": False}, (2, 0, 0)),
    "falcon-40b": ("Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, (2, 0, 0)),
    "falcon-11b": (
        "Falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        (1, 0, 0),
    ),
    "gpt-neox": ("GPTNeoX", _NO_GQA, (2, 0, 0)),
    "gpt2": ("GPT2", {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, (2, 0, 1)),
}  # fmt: skip

PROBE = torch.arange(2, 26).reshape(2, 12)


def tiny(name: str) -> nn.Module:
    """A model whose norms and biases are not the ones they start from, so that wrong wiring shows."""
    kind, settings, _ = CASES[name]
    torch.manual_seed(0)
    suffix = "TextConfig" if kind == "Gemma3" else "Config"
    config = getattr(transformers, f"{kind}{suffix}")(**settings)
    heads = {"GPT2": "GPT2LMHeadModel"}
    model: nn.Module = getattr(transformers, heads.get(kind, f"{kind}ForCausalLM"))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter) * 0.5)
            else:
                parameter.mul_(4)
    return model.eval()


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=PROBE, use_cache=False).logits
    return logits.double()


def _change(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("name", CASES)
def test_scales_pass_through_every_pair(name: str) -> None:
    model, expected = tiny(name), CASES[name][2]
    pairs = find_pairs(model)
    norms = [pair for pair in pairs if pair.kind in (ProducerKind.NORM, ProducerKind.NORM_PLUS_ONE)]
    counts = (
        len(norms) / 2,
        sum(pair.kind is ProducerKind.LINEAR for pair in pairs) / 2,
        sum(pair.kind is ProducerKind.VALUE for pair in pairs) / 2,
    )
    assert counts == expected
    before = _logits(model)
    for pair in pairs:
        fold_scales(model, pair, torch.rand(pair.channels) * 3 + 0.3)
    assert _change(before, _logits(model)) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "gpt2", "phi3"])
def test_a_pair_that_misses_a_reader_or_names_the_wrong_kind_shows(name: str) -> None:
    model = tiny(name)
    for pair in find_pairs(model):
        assert preserves_function(model, [pair], PROBE) <= 1e-5
        if len(pair.consumers) > 1:
            missing = Pair(pair.producer, pair.consumers[1:], pair.kind, pair.channels, pair.outputs)
            assert preserves_function(model, [missing], PROBE) > 1e-3
        if pair.kind is ProducerKind.NORM_PLUS_ONE:
            wrong = Pair(pair.producer, pair.consumers, ProducerKind.NORM, pair.channels, pair.outputs)
            assert preserves_function(model, [wrong], PROBE) > 1e-3


def test_the_table_agrees_with_what_a_run_of_the_model_shows() -> None:
    for name in ("llama", "gemma2", "cohere", "phi3", "opt", "gpt-neox", "falcon-7b", "gpt2", "qwen3"):
        model = tiny(name)
        table = {(pair.producer, frozenset(pair.consumers)): pair for pair in find_pairs(model)}
        model.config.model_type = "unheard_of"
        found = {(pair.producer, frozenset(pair.consumers)): pair for pair in find_pairs(model)}
        assert set(table) == set(found), name
        for key, pair in table.items():
            assert (found[key].kind, found[key].outputs) == (
                pair.kind,
                pair.outputs,
            ) or pair.kind is ProducerKind.VALUE


def test_probing_leaves_the_weights_as_they_were() -> None:
    model = tiny("qwen2")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.config.model_type = "unheard_of"
    assert find_pairs(model, PROBE)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_what_has_no_pairs_is_an_unsupported_architecture() -> None:
    model = tiny("opt-post-norm")
    model.config.model_type = "unheard_of"
    with pytest.raises(ValueError, match="unsupported model architecture OPTForCausalLM") as caught:
        find_pairs(model)
    assert isinstance(caught.value, ValidationError)
    assert "llama" in (caught.value.hint or "")


def test_scales_of_the_wrong_size_or_sign_are_refused() -> None:
    model = tiny("llama")
    pair = find_pairs(model)[0]
    for scales in (torch.ones(3), torch.zeros(pair.channels), torch.full((pair.channels,), float("nan"))):
        with pytest.raises(ValidationError, match="positive scales"):
            fold_scales(model, pair, scales)
