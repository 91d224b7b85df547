"""Which layers feed which: from a table of architectures, else found by running the model.

Every use of the pairs rests on one property: moving positive scales across a pair changes nothing.
:func:`preserves_function` measures it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from qwodel.exceptions import ValidationError
from qwodel.modeling.pairs import Pair, make_pair
from qwodel.modeling.wiring_probe import infer_pairs, preserves_function
from qwodel.modeling.wiring_table import RULES, ProducerKind, Rule

__all__ = ["Pair", "ProducerKind", "find_pairs", "preserves_function"]

_LAYER = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.\d+")


def find_pairs(model: nn.Module, probe: torch.Tensor | None = None) -> tuple[Pair, ...]:
    """Return the pairs of a transformers model, in the order of its layers.

    Model types of the table take its rules. Others are run on ``probe`` with hooks: which linear
    layers read exactly what a norm gives, and which layers' outputs reach another linear layer
    with nothing but a product between. What is found is kept only if folding random scales
    through it leaves the logits as they are.

    Args:
        model: a causal language model with its weights (any dtype, on one device).
        probe: int64 token ids ``[batch, tokens]``; sixteen fixed ones where ``None``.

    Raises:
        ValidationError: ``unsupported model architecture …``: no pair was found.
    """
    config = _text_config(model)
    model_type = str(getattr(config, "model_type", "") or type(model).__name__)
    rules = RULES.get(model_type)
    if rules is not None:
        pairs = tuple(_from_table(model, rules, config))
        reason = "its layers are not named as this model type's are"
    else:
        pairs, reason = infer_pairs(model, probe, config)
    if not pairs:
        raise ValidationError(
            f"unsupported model architecture {type(model).__name__} ({model_type}): {reason}",
            hint=f"architectures with known wiring: {', '.join(RULES)}",
        )
    return pairs


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text(decoder=True) if callable(text) else config


def _from_table(model: nn.Module, rules: tuple[Rule, ...], config: Any) -> Iterator[Pair]:
    for layer, names in _layers(model).items():
        for rule in rules:
            yield from _pairs_of_rule(model, layer, names, rule, config)


def _layers(model: nn.Module) -> Mapping[str, set[str]]:
    """Return decoder layer → names below it, of modules and of parameters."""
    layers: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        if _LAYER.fullmatch(name) and not any(name.startswith(f"{known}.") for known in layers):
            below = {child for child, _ in module.named_modules() if child}
            layers[name] = below | {parameter for parameter, _ in module.named_parameters()}
    return layers


def _pairs_of_rule(model: nn.Module, layer: str, names: set[str], rule: Rule, config: Any) -> Iterator[Pair]:
    fits = (
        all(each in names for each in rule.needs)
        and not any(each in names for each in rule.lacks)
        and all(getattr(config, key, None) == value for key, value in rule.config.items())
    )
    if not fits:
        return
    for producer, part in _expand(rule.producer, names):
        patterns = [consumer.replace("*", part) if part else consumer for consumer in rule.consumers]
        consumers = [f"{layer}.{name}" for pattern in patterns for name, _ in _expand(pattern, names)]
        if consumers:
            yield make_pair(model, f"{layer}.{producer}", tuple(consumers), rule.kind, config)


def _expand(pattern: str, names: set[str]) -> list[tuple[str, str]]:
    """Return the names a pattern stands for, each with what its ``*`` stands for."""
    if "*" not in pattern:
        return [(pattern, "")] if pattern in names else []
    expression = re.compile(re.escape(pattern).replace(r"\*", "([^.]+)"))
    found = [(name, match[1]) for name in names if (match := expression.fullmatch(name))]
    return sorted(found, key=lambda item: (len(item[1]), item[1]))
