"""How far each channel of a layer's inputs reaches, and the inputs of some tokens; padding does not count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from qwodel.exceptions import ValidationError
from qwodel.modeling.observe.watcher import Reading

__all__ = ["GreatestValues", "TokenSamples"]

_RECENT = 8  # distinct inputs whose samples are shared with the layers that read them, too


@dataclass(slots=True)
class GreatestValues:
    """A sink that keeps the greatest absolute value of every input channel.

    Attributes:
        peaks: layer → fp32 ``[N]`` on the CPU; filled.
        names: layer → the names to keep its inputs under, where that is not its own.
    """

    peaks: dict[str, torch.Tensor] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def take(self, reading: Reading) -> None:
        """Take in one input.

        Raises:
            ValidationError: NaN or Inf.
        """
        rows = reading.rows()
        if not len(rows):
            return
        peak = rows.abs().amax(dim=0).float().cpu()
        if not bool(peak.isfinite().all()):
            raise ValidationError(f"{reading.layer} reads NaN or Inf", hint="calibrate in a wider dtype")
        for name in self.names.get(reading.layer, (reading.layer,)):
            self.peaks[name] = torch.maximum(self.peaks[name], peak) if name in self.peaks else peak

    def forget(self) -> None:
        """Nothing: no input is held."""


@dataclass(slots=True)
class TokenSamples:
    """A sink that keeps what layers read of a few tokens of each batch.

    Attributes:
        tokens: how many a batch and layer, at even distances.
        names: layer → the names to keep its inputs under, where that is not its own.
    """

    tokens: int
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    _parts: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    _recent: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def take(self, reading: Reading) -> None:
        """Take in one input."""
        rows = reading.rows()
        if not len(rows):
            return
        sample = self._sample(reading.inputs, rows)
        for name in self.names.get(reading.layer, (reading.layer,)):
            self._parts.setdefault(name, []).append(sample)

    def forget(self) -> None:
        """Forget the tensors of the batch that has ended."""
        self._recent.clear()

    def result(self) -> dict[str, torch.Tensor]:
        """Layer → fp32 ``[tokens, N]`` on the CPU; layers that read the same tensors have one in common."""
        joined: dict[tuple[int, ...], torch.Tensor] = {}
        samples = {}
        for name, parts in self._parts.items():
            key = tuple(map(id, parts))
            if key not in joined:
                joined[key] = torch.cat(parts)
            samples[name] = joined[key]
        return samples

    def _sample(self, inputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        for tensor, sample in self._recent:
            if tensor is inputs:
                return sample
        # The first tokens are among them: they carry the greatest activations.
        places = torch.linspace(
            0, len(rows) - 1, min(self.tokens, len(rows)), dtype=torch.float32, device=rows.device
        ).long()
        sample = rows[places].float().cpu()
        self._recent = [*self._recent[1 - _RECENT :], (inputs, sample)]
        return sample
