"""A bounded sample of the rows a layer reads, and how far each channel reaches over all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qwodel.exceptions import CalibrationError
from qwodel.modeling.observe.watcher import Reading

__all__ = ["LayerInputs", "RowSampler", "RowSamples", "thinned"]

_HELD_OUT = 4  # every fourth batch


@dataclass(frozen=True, slots=True, eq=False)
class LayerInputs:
    """Inputs of a layer with ``N`` channels.

    Attributes:
        fit: rows to fit on, fp32 ``[T, N]``.
        held: other rows, to judge what was fitted.
        low, high: least and greatest value of each channel over all rows, ``[N]``.
        count: how many rows there were.
    """

    fit: torch.Tensor
    held: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    count: int

    @property
    def peak(self) -> torch.Tensor:
        """Greatest absolute value of each channel."""
        return torch.maximum(self.high, -self.low)

    @property
    def rows(self) -> torch.Tensor:
        """All rows that were kept."""
        return torch.cat((self.fit, self.held))


class RowSampler:
    """Takes rows from batches, evenly, and copies them: what a model computes with is never touched.

    Args:
        name: of the layer, for errors.
        batches: how many will come.
        limit: rows to keep in all.
    """

    def __init__(self, name: str, batches: int, limit: int) -> None:
        self._name, self._each = name, max(-(-limit // max(batches, 1)), 1)
        self._kept: list[torch.Tensor] = []
        self._low: torch.Tensor | None = None
        self._high: torch.Tensor | None = None
        self._count = 0

    def add(self, rows: torch.Tensor) -> None:
        """Take in ``[T, N]`` of any floating dtype.

        Raises:
            CalibrationError: NaN or Inf among them.
        """
        if not len(rows):
            return
        low, high = rows.amin(dim=0).float(), rows.amax(dim=0).float()
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise CalibrationError(
                f"the inputs of {self._name} hold NaN or Inf",
                hint="calibrate in a wider dtype, such as float32",
            )
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        self._count += len(rows)
        self._kept.append(thinned(rows, self._each).detach().to(torch.float32, copy=True))

    def live_bytes(self) -> int:
        """Bytes of the rows that are kept."""
        return sum(rows.numel() * rows.element_size() for rows in self._kept)

    def result(self) -> LayerInputs:
        """The sample; every fourth batch, or of fewer batches every fourth row, is held out.

        Raises:
            CalibrationError: the layer never ran.
        """
        if self._low is None or self._high is None:
            raise CalibrationError(f"no calibration data reached {self._name}")
        fit, held = _divide(self._kept)
        return LayerInputs(fit, held, self._low, self._high, self._count)


@dataclass(frozen=True, slots=True)
class RowSamples:
    """A sink of samplers.

    Attributes:
        samplers: layer → what samples its rows.
        rows_of: the rows ``[T, N]`` of a layer's input, whatever its shape.
    """

    samplers: Mapping[str, RowSampler]
    rows_of: Callable[[nn.Module, torch.Tensor], torch.Tensor]

    def take(self, reading: Reading) -> None:
        """See :meth:`RowSampler.add`."""
        self.samplers[reading.layer].add(self.rows_of(reading.module, reading.inputs))

    def forget(self) -> None:
        """Nothing: rows are copies."""

    def result(self) -> dict[str, LayerInputs]:
        """See :meth:`RowSampler.result`."""
        return {name: sampler.result() for name, sampler in self.samplers.items()}


def thinned(rows: torch.Tensor, limit: int) -> torch.Tensor:
    """At most ``limit`` of the rows, at even distances."""
    step = max(len(rows) // limit, 1)
    return rows[::step][:limit]


def _divide(kept: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    last = _HELD_OUT - 1
    if len(kept) >= _HELD_OUT:
        held = [rows for index, rows in enumerate(kept) if index % _HELD_OUT == last]
        return torch.cat([rows for index, rows in enumerate(kept) if index % _HELD_OUT != last]), torch.cat(
            held
        )
    rows = torch.cat(list(kept))
    if len(rows) < _HELD_OUT:
        return rows, rows
    chosen = torch.arange(len(rows), device=rows.device) % _HELD_OUT == last
    return rows[~chosen], rows[chosen]
