"""Moving scales across a pair: the producer's outputs shrink, the consumers' weights grow.

For a pair with scales s, ``y = W x`` with ``x = g(…)`` becomes ``y = (W·diag(s)) (x/s)``: the
function stays as it was, and what reads x sees other magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qwodel.exceptions import ValidationError
from qwodel.modeling.pairs import Pair, input_weight, output_weight
from qwodel.modeling.wiring_table import ProducerKind

__all__ = ["fold_scales", "kept_weights", "remember_weights"]


@torch.no_grad()
def fold_scales(model: nn.Module, pair: Pair, scales: torch.Tensor) -> None:
    """Divide the producer's outputs by ``scales`` and multiply the consumers' inputs, in place.

    Args:
        model: holds both.
        pair: from :func:`~qwodel.modeling.wiring.find_pairs`.
        scales: positive, ``[pair.channels]``. Of a VALUE pair, one per value channel.

    Raises:
        ValidationError: the scales have another size, or are not positive and finite.
    """
    if scales.shape != (pair.channels,) or not bool((scales > 0).all() and scales.isfinite().all()):
        raise ValidationError(
            f"{pair.producer} takes {pair.channels} positive scales; given {list(scales.shape)}"
        )
    factors = scales.double()
    _shrink_producer(model, pair, factors)
    spread = pair.spread(factors)
    for name in pair.consumers:
        weight, axis = input_weight(model, name)
        _multiply(weight, axis, spread)


def _shrink_producer(model: nn.Module, pair: Pair, factors: torch.Tensor) -> None:
    producer = model.get_submodule(pair.producer)
    if pair.kind is ProducerKind.NORM_PLUS_ONE:
        weight = producer.weight
        assert isinstance(weight, nn.Parameter)
        factors = factors.to(weight.device)
        weight.copy_(((1.0 + weight.double()) / factors - 1.0).to(weight.dtype))
        return
    if pair.kind is ProducerKind.NORM:
        parameters = [(each, 0) for each in (producer.weight, getattr(producer, "bias", None))]
        outputs = slice(None)
    else:
        weight, axis = output_weight(model, pair.producer)
        parameters = [(weight, axis), (getattr(producer, "bias", None), 0)]
        outputs = slice(*pair.outputs)
    for parameter, axis in parameters:
        if isinstance(parameter, nn.Parameter):
            part = parameter.movedim(axis, -1)[..., outputs]
            part.copy_((part.double() / factors.to(part.device)).to(part.dtype))


def _multiply(parameter: nn.Parameter, axis: int, factors: torch.Tensor) -> None:
    view = parameter.movedim(axis, -1)
    view.copy_((view.double() * factors.to(view.device)).to(view.dtype))


@contextmanager
def kept_weights(model: nn.Module, pairs: tuple[Pair, ...]) -> Iterator[None]:
    """Restore, on leaving, every parameter that folding scales into ``pairs`` can change."""
    restore = remember_weights(model, pairs)
    try:
        yield
    finally:
        restore()


def remember_weights(model: nn.Module, pairs: tuple[Pair, ...]) -> Callable[[], None]:
    """Copy every parameter that folding scales into ``pairs`` can change; return what restores them."""
    touched: dict[int, nn.Parameter] = {}
    for pair in pairs:
        for parameter in model.get_submodule(pair.producer).parameters(recurse=False):
            touched[id(parameter)] = parameter
        for name in pair.consumers:
            weight, _ = input_weight(model, name)
            touched[id(weight)] = weight
    saved = [(parameter, parameter.detach().clone()) for parameter in touched.values()]

    @torch.no_grad()
    def restore() -> None:
        for parameter, value in saved:
            parameter.copy_(value)

    return restore
