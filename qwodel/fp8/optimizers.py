"""The optimizers of learned rounding, by name, as functions of a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwodel.algorithms.converter_options import rounding_options
from qwodel.algorithms.learned_rounding import LearnedRounding, learn_rounding
from qwodel.algorithms.optimizers import update_rule
from qwodel.algorithms.quant_types import FP8_E4M3, TENSOR, Granularity, QuantType

__all__ = ["get_optimizer"]


def get_optimizer(name: str) -> Callable[..., LearnedRounding]:
    """The optimizer of that name: a function that rounds one weight.

    The function is ``optimize(weight, quant_type=FP8_E4M3, granularity=TENSOR, *, scale=None,
    gram=None, **settings)`` and returns a
    :class:`~qwodel.algorithms.learned_rounding.LearnedRounding`; ``settings`` are those of
    :class:`~qwodel.fp8.LearnedRoundingConverter`.

    Args:
        name: ``"original"``, ``"adamw"``, ``"radam"`` or ``"ppsf"``.

    Raises:
        ValueError: the name is not recognized (a ConfigurationError).
        DependencyError: ``"ppsf"`` without its package.
    """
    update_rule(name)

    def optimize(
        weight: torch.Tensor,
        quant_type: QuantType = FP8_E4M3,
        granularity: Granularity = TENSOR,
        *,
        scale: torch.Tensor | None = None,
        gram: torch.Tensor | None = None,
        **settings: Any,
    ) -> LearnedRounding:
        options = rounding_options(name, settings)
        return learn_rounding(weight, quant_type, granularity, options, scale=scale, gram=gram)

    optimize.__name__ = optimize.__qualname__ = name
    return optimize
