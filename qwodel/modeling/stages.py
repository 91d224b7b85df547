"""The layers of a block in the order in which they run, so that each is quantized before the next one is fed.

A block in stages is run once: every batch stops before a layer, the layer's inputs are summed up, it
is quantized, and all batches go on with its quantized output. Later layers of the same block see the
errors of earlier ones too ("true sequential" in GPTQ's own code).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import nn

from qwodel.modeling.observe.gram import GramSums
from qwodel.modeling.observe.layers import is_fused_experts
from qwodel.modeling.observe.watcher import Watcher
from qwodel.modeling.stepwise import Arrival

__all__ = ["Stage", "copied", "find_stages", "token_counts"]

Stage = tuple[str, ...]
"""Names of layers that read the same tensor one after another, the one that runs first in front."""


def find_stages(
    unit: nn.Module, layers: Mapping[str, nn.Module], arrival: Arrival
) -> tuple[Stage, ...] | None:
    """Watch a block run on one batch.

    Args:
        unit: the block, with its weights.
        layers: the linear layers in it, by name.
        arrival: what the block is called with; left as it is.

    Returns:
        its stages in order; ``None`` where it cannot be run in stages: experts and other layers that
        see part of the tokens, or none of this batch's, need every batch before they are quantized.
    """
    if unit in layers.values() or any(is_fused_experts(layer) for layer in layers.values()):
        return None
    sums = GramSums(gram=False)
    with Watcher(layers, sums):
        unit(*copied(arrival.args), **copied(arrival.kwargs))
    whole = token_counts(arrival)
    if len(sums.seen()) < len(layers) or any(group.sums.count not in whole for group in sums.groups()):
        return None
    # A layer that reads an input again when others have run in between is a stage of its own.
    runs = groupby(sums.seen().items(), key=lambda item: id(item[1]))
    return tuple(tuple(name.removesuffix(".weight") for (name, _), _ in run) for _, run in runs)


def token_counts(arrival: Arrival) -> frozenset[int]:
    """How many vectors a layer may read that sees all tokens of a batch."""
    return frozenset(math.prod(each.shape[:-1]) for each in _tensors((arrival.args, arrival.kwargs)))


def copied(value: Any) -> Any:
    """Arguments for a trial run: a block that changes its input in place changes a copy."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(copied(each) for each in value)
    if isinstance(value, dict):
        return {key: copied(each) for key, each in value.items()}
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
