"""One sampling run of a pipeline: how its inputs are passed, and how it starts from a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from qwodel.process_state import SEEDED_RUN

__all__ = ["call_arguments", "modules_of", "seeded", "to_cpu"]


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that an item or a batch of a data set stands for.

    A mapping gives keyword arguments, a tuple positional ones, a tuple of a tuple and a mapping
    both. A list is what ``DataLoader`` makes of tuples, and positional arguments too, unless it holds
    texts: these are one batch of prompts, and one argument, as is anything else.
    """
    if isinstance(inputs, Mapping):
        return (), {str(key): value for key, value in inputs.items()}
    if isinstance(inputs, tuple | list) and len(inputs) == 2:
        first, second = inputs
        if isinstance(first, tuple | list) and isinstance(second, Mapping):
            return tuple(first), {str(key): value for key, value in second.items()}
    if isinstance(inputs, tuple) or (
        isinstance(inputs, list) and not all(isinstance(each, str) for each in inputs)
    ):
        return tuple(inputs), {}
    return (inputs,), {}


@contextmanager
def seeded(seed: int, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Start torch's generators from ``seed``, and put them back afterwards; one run of the process at a time.

    Generators among ``kwargs`` start ``seed`` after their own first seed, so that a run does not
    depend on the runs before it.
    """
    generators = [leaf for leaf in pytree.tree_leaves(dict(kwargs)) if isinstance(leaf, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    with SEEDED_RUN, torch.random.fork_rng():
        torch.manual_seed(seed)
        for generator in generators:
            generator.manual_seed(generator.initial_seed() + seed)
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def modules_of(model: Callable[..., Any]) -> dict[str, nn.Module]:
    """Return the torch modules of a pipeline (``components`` or attributes) by name; of a module, itself."""
    if isinstance(model, nn.Module):
        return {"": model}
    components = getattr(model, "components", None)
    members = components if isinstance(components, Mapping) else getattr(model, "__dict__", {})
    return {name: member for name, member in sorted(members.items()) if isinstance(member, nn.Module)}


def to_cpu(item: Any) -> Any:
    """Return a copy with tensors detached, on the CPU, and in storages of their own."""
    return pytree.tree_map(
        lambda leaf: (
            leaf.detach().to("cpu", copy=True).contiguous() if isinstance(leaf, torch.Tensor) else leaf
        ),
        item,
    )
