"""What a layer's inputs look like: their Gram matrix, means and greatest values, summed over batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwodel.exceptions import ValidationError

__all__ = ["GramAccumulator", "InputStatistics"]


_STRIPS = 6
"""Parts in which the upper triangle is formed: 7/12 of the whole product's work."""

_NARROWEST = 64
_TILE = 1024


@dataclass(frozen=True, slots=True, eq=False)
class InputStatistics:
    """Statistics of the inputs x of a layer with ``N`` input channels.

    Attributes:
        gram: mean of xxᵀ over the inputs, ``[N, N]``; ``None`` where it was not asked for.
        mean: ``[N]``, fp32.
        channel_max: greatest absolute value of each channel, ``[N]``, fp32.
        count: how many inputs (tokens) were seen.
        drift: mean of (x₀ − x)xᵀ, ``[N, N]``, x₀ being what the unquantized model reads in place of x;
            ``None`` where that was not watched.
    """

    gram: torch.Tensor | None
    mean: torch.Tensor
    channel_max: torch.Tensor
    count: int
    drift: torch.Tensor | None = None


class GramAccumulator:
    """Sums up a layer's inputs, batch by batch.

    A batch's XᵀX is formed in fp32 and added in the sum's own precision: fp64, so that a billion
    tokens still count, unless a buffer of another dtype is given.

    Args:
        columns: input channels N.
        gram: also sum XᵀX, which takes N² numbers.
        buffer: ``[N, N]`` of zeros to sum XᵀX in, such as a memory-mapped one.
    """

    def __init__(self, columns: int, *, gram: bool = True, buffer: torch.Tensor | None = None) -> None:
        self.count = 0
        self._sum = torch.zeros(columns, dtype=torch.float64)
        self._max = torch.zeros(columns, dtype=torch.float32)
        self._gram = buffer
        self._drift: torch.Tensor | None = None
        self._paired = 0
        if gram and buffer is None:
            self._gram = torch.zeros(columns, columns, dtype=torch.float64)

    def add(self, inputs: torch.Tensor, source: torch.Tensor | None = None) -> None:
        """Take in a batch, ``[..., N]``, of any floating dtype and device.

        Args:
            inputs: x, a token a row.
            source: x₀, what the unquantized model reads in place of ``inputs``. Drift is known where
                it was given with every batch.

        Raises:
            ValidationError: the width does not fit, or NaN or Inf among the inputs.
        """
        if inputs.shape[-1] != len(self._sum):
            raise ValidationError(f"inputs of width {inputs.shape[-1]} do not fit {len(self._sum)} channels")
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if not len(rows):
            return
        peak = rows.abs().amax(dim=0).cpu()
        if not bool(peak.isfinite().all()):
            raise ValidationError("the layer's inputs hold NaN or Inf", hint="calibrate in a wider dtype")
        self.count += len(rows)
        self._sum += rows.sum(dim=0).cpu()
        torch.maximum(self._max, peak, out=self._max)
        if self._gram is not None:
            self._add_products(self._gram, rows)
            if source is not None:
                self._add_drift(rows, source.detach().reshape(rows.shape).float())

    def _add_products(self, gram: torch.Tensor, rows: torch.Tensor) -> None:
        """Sum XᵀX's upper triangle, strip by strip: :meth:`result` mirrors it."""
        width = max(-(-len(gram) // _STRIPS), _NARROWEST)
        for start in range(0, len(gram), width):
            stop = start + width
            gram[start:stop, start:] += (rows[:, start:stop].T @ rows[:, start:]).to(gram.device)

    def _add_drift(self, rows: torch.Tensor, source: torch.Tensor) -> None:
        if self._drift is None:
            self._drift = torch.zeros(self.columns, self.columns, dtype=torch.float32)
        # Rounded to bf16, the small difference keeps its own relative precision.
        self._drift += ((source - rows).T @ rows).cpu()
        self._paired += len(rows)

    @property
    def columns(self) -> int:
        """Input channels."""
        return len(self._sum)

    def copy(self) -> GramAccumulator:
        """An accumulator that goes on from here on its own."""
        twin = GramAccumulator(len(self._sum), gram=False)
        twin.count, twin._sum, twin._max = self.count, self._sum.clone(), self._max.clone()
        twin._gram = None if self._gram is None else self._gram.clone()
        twin._drift = None if self._drift is None else self._drift.clone()
        twin._paired = self._paired
        return twin

    def result(self) -> InputStatistics:
        """The statistics so far; the Gram matrix is the accumulator's own, divided in place once.

        Raises:
            ValidationError: nothing was taken in.
        """
        if not self.count:
            raise ValidationError("no inputs were seen")
        gram, self._gram = self._gram, None
        if gram is not None:
            gram.div_(self.count)
            _mirror(gram)
        drift, self._drift = self._drift if self._paired == self.count else None, None
        if drift is not None:
            drift.div_(self.count)
        mean = (self._sum / self.count).float()
        return InputStatistics(gram, mean, self._max.clone(), self.count, drift)


def _mirror(gram: torch.Tensor) -> None:
    """Copy the upper triangle to the lower, in place and tile by tile."""
    for start in range(0, len(gram), _TILE):
        stop = start + _TILE
        tile = gram[start:stop, start:stop]
        tile.copy_(tile.triu() + tile.triu(1).T)
        gram[stop:, start:stop] = gram[start:stop, stop:].T
