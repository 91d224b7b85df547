"""Pairs found by running the model: candidates from hooks and shapes, each proved by folding scales."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from qwodel.exceptions import ValidationError
from qwodel.modeling.fold import fold_scales, kept_weights
from qwodel.modeling.norm_readers import find_norm_readers
from qwodel.modeling.pairs import Pair, input_weight, make_pair
from qwodel.modeling.wiring_table import ProducerKind

__all__ = ["default_probe", "infer_pairs", "preserves_function"]

_PROBE_TOKENS = 16
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_HALF_TOLERANCE = 3e-2  # the rounding of 16-bit activations; a wrong pair gives about 1


def preserves_function(
    model: nn.Module, pairs: Iterable[Pair], probe: torch.Tensor | None = None, *, seed: int = 0
) -> float:
    """Fold random scales through ``pairs`` and return the relative change of the logits.

    The weights are restored. Scales are powers of two from ¼ to 4, so that the folding itself
    rounds nothing but the weights of ``1 + w`` norms.

    Returns:
        ``‖after − before‖ / ‖before‖``.
    """
    pairs = tuple(pairs)
    probe = default_probe(model) if probe is None else probe
    generator = torch.Generator().manual_seed(seed)
    before = _logits(model, probe)
    with kept_weights(model, pairs):
        for pair in pairs:
            exponents = torch.randint(-2, 3, (pair.channels,), generator=generator)
            fold_scales(model, pair, torch.exp2(exponents.float()))
        after = _logits(model, probe)
    return float((after - before).norm() / before.norm().clamp_min(1e-30))


def infer_pairs(model: nn.Module, probe: torch.Tensor | None, config: Any) -> tuple[tuple[Pair, ...], str]:
    """Return the pairs that hold, and why there are none otherwise."""
    probe = default_probe(model) if probe is None else probe
    readers, inner = _observe(model, probe)
    if not readers:
        return (), "no linear layer reads exactly what a norm gives"
    dtype = next(model.parameters()).dtype
    bound = _TOLERANCE.get(dtype, _HALF_TOLERANCE)
    kept: list[Pair] = []
    for candidates in (*_norm_candidates(model, readers, config), *_inner_candidates(model, inner, config)):
        for group in candidates:
            taken = {pair.consumers for pair in kept}
            group = tuple(pair for pair in group if pair.consumers not in taken)
            if group and preserves_function(model, group, probe) <= bound:
                kept.extend(group)
    if not any(pair.kind in (ProducerKind.NORM, ProducerKind.NORM_PLUS_ONE) for pair in kept):
        tried = ", ".join(sorted({_pattern(norm) for norm in readers})[:4])
        return (), f"scales do not pass from its norms ({tried}) to the layers that read them"
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return tuple(sorted(kept, key=lambda pair: order[pair.producer])), ""


def default_probe(model: Any, *, tokens: int = _PROBE_TOKENS, seed: int = 0) -> torch.Tensor:
    """A few random tokens to run a language model on, ``[1, tokens]``.

    Raises:
        ValidationError: the model does not embed tokens.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(embedding, nn.Embedding):
        raise ValidationError(
            f"unsupported model architecture {type(model).__name__}: it does not embed tokens",
            hint="give a probe the model can be run on",
        )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(embedding.num_embeddings, (1, tokens), generator=generator)
    return ids.to(embedding.weight.device)


@torch.no_grad()
def _logits(model: nn.Module, probe: torch.Tensor) -> torch.Tensor:
    training = model.training
    model.eval()
    try:
        logits: torch.Tensor = model(input_ids=probe, use_cache=False).logits
    finally:
        model.train(training)
    return logits.double()


def _observe(model: Any, probe: torch.Tensor) -> tuple[dict[str, list[str]], list[str]]:
    """Return norm → the matrices that read its output, and the linear layers that read none."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

    def is_reader(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return isinstance(weight, nn.Parameter) and weight.ndim == 2 and module is not head

    return find_norm_readers(
        model,
        lambda: _logits(model, probe),
        is_norm=lambda module: "norm" in type(module).__name__.casefold(),
        is_reader=is_reader,
    )


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _grouped(pairs: Iterable[Pair]) -> list[tuple[Pair, ...]]:
    """Return the pairs of all layers together: what holds in one layer is proved for all at once."""
    groups: defaultdict[tuple[str, tuple[str, ...]], list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[_pattern(pair.producer), tuple(map(_pattern, pair.consumers))].append(pair)
    return [tuple(group) for group in groups.values()]


def _norm_candidates(
    model: nn.Module, readers: dict[str, list[str]], config: Any
) -> Iterator[list[tuple[Pair, ...]]]:
    for kind in (ProducerKind.NORM, ProducerKind.NORM_PLUS_ONE):
        yield _grouped(make_pair(model, norm, tuple(names), kind, config) for norm, names in readers.items())


def _inner_candidates(model: nn.Module, inner: list[str], config: Any) -> Iterator[list[tuple[Pair, ...]]]:
    """Yield, for every layer that reads no norm, the layers beside it whose outputs fit its inputs."""
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    for kind in (ProducerKind.LINEAR, ProducerKind.VALUE):
        candidates = []
        for consumer in inner:
            parent = consumer.rpartition(".")[0]
            weight, axis = input_weight(model, consumer)
            if kind is ProducerKind.VALUE and (not heads or weight.shape[axis] % heads):
                continue
            for child, module in model.get_submodule(parent).named_children():
                producer = f"{parent}.{child}" if parent else child
                matrix = getattr(module, "weight", None)
                if producer == consumer or not isinstance(matrix, nn.Parameter) or matrix.ndim != 2:
                    continue
                try:
                    candidates.append(make_pair(model, producer, (consumer,), kind, config))
                except ValidationError:
                    continue
        yield _grouped(candidates)
