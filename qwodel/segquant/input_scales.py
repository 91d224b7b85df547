"""Static scales of a layer's inputs: the smallest that reach every value, or those of least error."""

from __future__ import annotations

import torch

from qwodel.modeling.observe.rows import LayerInputs, thinned
from qwodel.modules.input_rounding import InputFormat, InputRounding, input_grid
from qwodel.segquant.smoothed_weight import SmoothedWeight

__all__ = ["SEARCH_ROWS", "input_rounding"]

SEARCH_ROWS = 512
"""How many rows the candidates of a search are compared on."""

_CLIPS = tuple(1 - 0.05 * step for step in range(1, 15))


def input_rounding(
    form: InputFormat,
    sizes: tuple[int, ...],
    inputs: LayerInputs,
    weight: SmoothedWeight,
    *,
    clip: bool = False,
) -> InputRounding:
    """What rounds the inputs of a weight, its grid set where that is static.

    Args:
        sizes: columns with scales of their own.
        inputs: before smoothing.
        clip: scales may clip; else the range of all values fits.
    """
    rounding = InputRounding(form, sizes, device=weight.weight.device)
    if form.quant_type is None or form.dynamic:
        return rounding
    low = torch.split(weight.inputs(inputs.low), list(sizes))
    high = torch.split(weight.inputs(inputs.high), list(sizes))
    least = torch.stack([part.amin().clamp(max=0) for part in low])[None]
    most = torch.stack([part.amax().clamp(min=0) for part in high])[None]
    rounding.set_grid(input_grid(least, most, form))
    if clip:
        rows = weight.inputs(thinned(inputs.fit, SEARCH_ROWS))
        _clip(rounding, least, most, rows, weight.weight.square().sum(dim=0))
    return rounding


def _clip(
    rounding: InputRounding,
    low: torch.Tensor,
    high: torch.Tensor,
    rows: torch.Tensor,
    importance: torch.Tensor,
) -> None:
    """Shrink each segment's range to that of least error, weighted by how much each channel matters."""
    sizes = list(rounding.sizes)
    best = torch.ones_like(low)
    least: torch.Tensor | None = None
    for ratio in (1.0, *_CLIPS):
        rounding.set_grid(input_grid(low * ratio, high * ratio, rounding.form))
        error = (rounding(rows) - rows).square().sum(dim=0) * importance
        found = torch.stack([part.sum() for part in error.split(sizes)])[None]
        if least is None:
            least = found
            continue
        best = torch.where(found < least, ratio, best)
        least = torch.minimum(found, least)
    rounding.set_grid(input_grid(low * best, high * best, rounding.form))
