"""Which layer feeds which, by model type: paths relative to a decoder layer.

A rule holds where its producer, at least one consumer and all of ``needs`` exist in a layer, none
of ``lacks`` does, and the configuration agrees with ``config``. ``*`` in a consumer stands for one
part of a path; where the producer has one too, both stand for the same part.

Sources: the models' code in transformers 5.17.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["RULES", "ProducerKind", "Rule"]


class ProducerKind(StrEnum):
    """How scales fold into a producer."""

    NORM = "norm"
    """A norm that computes ``w·x̂ (+ b)``: w and b are divided."""
    NORM_PLUS_ONE = "norm_plus_one"
    """A norm that computes ``(1 + w)·x̂``: w becomes ``(1 + w)/s − 1``."""
    LINEAR = "linear"
    """A linear layer whose outputs reach the consumer multiplied by something else at most."""
    VALUE = "value"
    """The value projection: its heads reach the consumer, each repeated once per query group."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One producer and everything that reads its output."""

    kind: ProducerKind
    producer: str
    consumers: tuple[str, ...]
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def _norm(producer: str, *consumers: str, **conditions: Any) -> Rule:
    return Rule(ProducerKind.NORM, producer, consumers, **conditions)


def _linear(producer: str, *consumers: str, **conditions: Any) -> Rule:
    return Rule(ProducerKind.LINEAR, producer, consumers, **conditions)


def _value(producer: str, *consumers: str, **conditions: Any) -> Rule:
    return Rule(ProducerKind.VALUE, producer, consumers, **conditions)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_V_O = _value("self_attn.v_proj", "self_attn.o_proj")
_UP_DOWN = _linear("mlp.up_proj", "mlp.down_proj")

_LLAMA = (
    _norm("input_layernorm", *_QKV),
    _V_O,
    _norm("post_attention_layernorm", *_GATE_UP, lacks=("mlp.experts",)),
    _UP_DOWN,
)

# Experts are one stacked parameter, or linear layers each once they have been taken apart.
_MOE = (
    _norm("input_layernorm", *_QKV),
    _V_O,
    _norm(
        "post_attention_layernorm",
        "mlp.gate",
        "mlp.experts.gate_up_proj",
        "mlp.experts.*.gate_proj",
        "mlp.experts.*.up_proj",
        "mlp.shared_expert_gate",
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
        needs=("mlp.experts",),
    ),
    _norm("post_attention_layernorm", *_GATE_UP, lacks=("mlp.experts",)),
    _linear("mlp.experts.*.up_proj", "mlp.experts.*.down_proj"),
    _linear("mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"),
    _UP_DOWN,
)

_GEMMA = (
    Rule(ProducerKind.NORM_PLUS_ONE, "input_layernorm", _QKV),
    _V_O,
    Rule(ProducerKind.NORM_PLUS_ONE, "post_attention_layernorm", _GATE_UP),
    _UP_DOWN,
)

# Two more norms a layer; post_attention_layernorm feeds the residual here.
_GEMMA_2 = (
    Rule(ProducerKind.NORM_PLUS_ONE, "input_layernorm", _QKV),
    _V_O,
    Rule(ProducerKind.NORM_PLUS_ONE, "pre_feedforward_layernorm", _GATE_UP),
    _UP_DOWN,
)

_COHERE = (_norm("input_layernorm", *_QKV, *_GATE_UP), _V_O, _UP_DOWN)

_FALCON_QKV, _FALCON_MLP = "self_attention.query_key_value", "mlp.dense_h_to_4h"

RULES: Mapping[str, tuple[Rule, ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mixtral": _MOE,
    "qwen2_moe": _MOE,
    "qwen3_moe": _MOE,
    "gemma": _GEMMA,
    "gemma2": _GEMMA_2,
    "gemma3_text": _GEMMA_2,
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "stablelm": (
        _norm("input_layernorm", *_QKV, needs=("post_attention_layernorm",)),
        _norm("post_attention_layernorm", *_GATE_UP),
        _norm("input_layernorm", *_QKV, *_GATE_UP, lacks=("post_attention_layernorm",)),
        _V_O,
        _UP_DOWN,
    ),
    "phi3": (
        _norm("input_layernorm", "self_attn.qkv_proj"),
        _value("self_attn.qkv_proj", "self_attn.o_proj"),
        _norm("post_attention_layernorm", "mlp.gate_up_proj"),
        _linear("mlp.gate_up_proj", "mlp.down_proj"),
    ),
    "phi": (
        _norm("input_layernorm", *_QKV, "mlp.fc1"),
        _value("self_attn.v_proj", "self_attn.dense"),
    ),
    "opt": (
        _norm("self_attn_layer_norm", *_QKV, config={"do_layer_norm_before": True}),
        _value("self_attn.v_proj", "self_attn.out_proj"),
        _norm("final_layer_norm", "fc1", config={"do_layer_norm_before": True}),
        # relu(s·x) = s·relu(x) for s > 0.
        _linear("fc1", "fc2", config={"activation_function": "relu"}),
    ),
    "bloom": (
        _norm(
            "input_layernorm",
            "self_attention.query_key_value",
            config={"apply_residual_connection_post_layernorm": False},
        ),
        _norm(
            "post_attention_layernorm",
            "mlp.dense_h_to_4h",
            config={"apply_residual_connection_post_layernorm": False},
        ),
    ),
    "falcon": (
        _norm("ln_attn", _FALCON_QKV),
        _norm("ln_mlp", _FALCON_MLP),
        _norm("input_layernorm", _FALCON_QKV, _FALCON_MLP, lacks=("post_attention_layernorm", "ln_attn")),
        _norm("input_layernorm", _FALCON_QKV, needs=("post_attention_layernorm",)),
        _norm("post_attention_layernorm", _FALCON_MLP),
    ),
    "gpt_neox": (
        _norm("input_layernorm", "attention.query_key_value"),
        _norm("post_attention_layernorm", "mlp.dense_h_to_4h"),
    ),
    "gpt2": (
        _norm("ln_1", "attn.c_attn"),
        _value("attn.c_attn", "attn.c_proj"),
        _norm("ln_2", "mlp.c_fc"),
    ),
}
"""Model type → the rules of its decoder layers."""
