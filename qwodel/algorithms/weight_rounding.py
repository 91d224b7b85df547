"""Scale and rounding together: the best this package does for one matrix with what is known.

=====================  ==========================================  ======================
known                  scale                                       rounding
=====================  ==========================================  ======================
nothing                FP8 rows and blocks: search; else absmax    learned, projected
activation scales      search weighted by their squares            nearest: then optimal
a Gram matrix          search under the Gram matrix                learned, output error
=====================  ==========================================  ======================

Without statistics an integer scale stays at absmax: clipping lowers the weight error but
takes its toll on the outliers that outputs depend on.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qwodel.algorithms.learned_rounding import LearnedRounding, RoundingOptions, learn_rounding
from qwodel.algorithms.quant_types import TENSOR, Granularity, QuantType
from qwodel.algorithms.scale_choice import check_gram
from qwodel.algorithms.scales import search_scale
from qwodel.algorithms.tiles import check_matrix
from qwodel.exceptions import ConfigurationError

__all__ = ["round_weight"]


def round_weight(
    weight: torch.Tensor,
    quant_type: QuantType,
    granularity: Granularity,
    options: RoundingOptions | None = None,
    *,
    activation_scales: torch.Tensor | None = None,
    gram: torch.Tensor | None = None,
) -> LearnedRounding:
    """Choose a scale, then learn the rounding; never worse than absmax round-to-nearest.

    With ``activation_scales`` the objective is Σ_j a_j² ‖E_j‖²: it has no terms between
    columns, so for a given scale rounding to nearest is its exact minimum and there is
    nothing to learn.

    Args:
        weight: ``[M, N]``, bf16, fp16, fp32 or fp64.
        options: settings of the rounding loop.
        activation_scales: ``[N]`` root mean square (or another magnitude) of each input channel.
        gram: ``[N, N]`` XᵀX of the layer's real inputs.

    Raises:
        ValidationError: NaN, Inf, no matrix, or statistics that do not fit.
        ConfigurationError: both kinds of statistics at once, or a bad setting.
    """
    options = options or RoundingOptions()
    if gram is not None and activation_scales is not None:
        raise ConfigurationError("give either gram or activation_scales: a Gram matrix already holds them")
    check_matrix(weight)
    gram = None if gram is None else check_gram(gram, weight.shape[1])
    weights = None if activation_scales is None else activation_scales.double().square()
    blind = gram is None and weights is None
    if blind and (granularity == TENSOR or not quant_type.is_float):
        return learn_rounding(weight, quant_type, granularity, options)
    scale = search_scale(weight, quant_type, granularity, gram=gram, channel_weights=weights)
    searched = learn_rounding(
        weight, quant_type, granularity, options, scale=scale, gram=gram, channel_weights=weights
    )
    nearest = replace(options, num_iter=0)
    plain = learn_rounding(weight, quant_type, granularity, nearest, gram=gram, channel_weights=weights)
    if searched.loss <= plain.loss:
        return replace(searched, nearest_loss=plain.loss)
    return learn_rounding(weight, quant_type, granularity, options, gram=gram, channel_weights=weights)
