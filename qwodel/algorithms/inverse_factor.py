"""The triangular factor of the inverse of a damped Gram matrix, which GPTQ spreads errors along."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwodel.algorithms.gptq_options import MAX_DAMPING, GptqOptions

__all__ = ["InverseFactor", "factorize"]

_DAMPING_STEP = 10.0


@dataclass(slots=True)
class InverseFactor:
    """U with UᵀU = (H + λI)⁻¹, upper triangular, made a few rows at a time.

    With J reversing the order, J H J = L Lᵀ gives U = J L⁻¹ J: the inverse itself is never formed,
    and only L and one segment of U are held.

    Attributes:
        lower: L, fp64 ``[N, N]``.
        order: column indices in the order of processing.
        damping: λ as a share of the mean diagonal.
        segment: rows of U made at once.
        added: what the diagonal got, in the order of processing, fp64 ``[N]``: λ, and the mean besides
            where the inputs are always zero.
    """

    lower: torch.Tensor
    order: torch.Tensor
    damping: float
    segment: int
    added: torch.Tensor
    _start: int = 0
    _rows: torch.Tensor | None = None

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """``U[start:stop, start:]``, fp64."""
        first = start // self.segment * self.segment
        if self._rows is None or self._start != first:
            self._rows, self._start = self._solve(first, min(first + self.segment, len(self.order))), first
        return self._rows[start - first : stop - first, start - first :]

    def _solve(self, start: int, stop: int) -> torch.Tensor:
        """``U[start:stop, start:]``: rows of L⁻¹ solve x L = e, and are zero beyond their own index."""
        size = len(self.order) - start
        unit = torch.zeros(stop - start, size, dtype=self.lower.dtype, device=self.lower.device)
        index = torch.arange(stop - start, device=unit.device)
        unit[index, size - (stop - start) + index] = 1
        corner = self.lower[:size, :size]
        rows: torch.Tensor = torch.linalg.solve_triangular(corner, unit, upper=False, left=False)
        return rows.flip(0, 1)


def factorize(gram: torch.Tensor, options: GptqOptions) -> InverseFactor | float:
    """Factor the damped Gram matrix; the last damping tried where none helps.

    Inputs that are always zero get the mean on the diagonal: they are simply rounded.
    """
    diagonal = gram.diagonal()
    count = len(diagonal)
    order = torch.arange(count, device=gram.device)
    if options.act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    backwards = order.flip(0)
    work = gram.index_select(0, backwards).index_select(1, backwards).double()
    mean = float(diagonal.double().mean()) or 1.0
    work.diagonal()[work.diagonal() == 0] = mean
    damping, added = options.damping, 0.0
    while True:
        work.diagonal().add_((damping - added) * mean)
        added = damping
        lower, failed = torch.linalg.cholesky_ex(work)
        if not int(failed) and bool(lower.diagonal().isfinite().all()):
            step = -(-count // (options.segments if count >= options.segment_from else 1))
            # Whole blocks, so that no block's rows lie in two segments.
            segment = -(-step // options.block_size) * options.block_size
            total = work.diagonal().flip(0) - diagonal[order].double()
            return InverseFactor(lower, order, damping, segment, total)
        if damping >= MAX_DAMPING:
            return damping
        damping = min(damping * _DAMPING_STEP, MAX_DAMPING)
