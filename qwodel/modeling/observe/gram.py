"""Sums of inputs and of their products; layers that read the same tensor (q, k and v) share one sum."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from qwodel.algorithms.gram import GramAccumulator
from qwodel.exceptions import ValidationError
from qwodel.modeling.observe.layers import LayerId, is_linear
from qwodel.modeling.observe.watcher import Reading

__all__ = ["GramSums", "InputGroup", "KeptInputs"]

_RECENT = 16  # distinct inputs remembered during a pass; layers that share one come soon after another


@dataclass(slots=True)
class InputGroup:
    """Layers that read the same inputs, and the sum of those."""

    layers: list[LayerId]
    sums: GramAccumulator


@dataclass(slots=True)
class _Recent:
    tensor: torch.Tensor
    version: int
    group: InputGroup


@dataclass(slots=True)
class GramSums:
    """A sink that sums up the inputs of each layer, padding and all.

    Args:
        gram: sum XᵀX too.
        buffer: makes the ``[N, N]`` of zeros that a Gram matrix is summed in; in memory if not given.
        even: let no token count for more than the median one of its pass, by the length of its vector.
            Where a few tokens are a hundred times as long as the others, the sums would know only those.
        sources: what layers of the unquantized model read in the pass at hand, in place of what they
            read here; fill it before a pass, :meth:`forget` empties it.
    """

    gram: bool = True
    buffer: Callable[[int], torch.Tensor] | None = None
    even: bool = False
    sources: dict[LayerId, torch.Tensor] = field(default_factory=dict)
    _groups: dict[LayerId, InputGroup] = field(default_factory=dict)
    _recent: list[_Recent] = field(default_factory=list)

    def forget(self) -> None:
        """Forget the tensors of the pass that has ended."""
        self._recent.clear()
        self.sources.clear()

    def groups(self) -> tuple[InputGroup, ...]:
        """Every group that has seen something, in the order in which layers ran."""
        return tuple({id(group): group for group in self._groups.values()}.values())

    def seen(self) -> Mapping[LayerId, InputGroup]:
        """Layers with at least one input, in the order in which they first ran, and their groups."""
        return self._groups

    def take(self, reading: Reading) -> None:
        """See :meth:`add`."""
        self.add(reading.id, reading.inputs)

    def add(self, layer: LayerId, inputs: torch.Tensor) -> None:
        """Take in what a layer reads, ``[..., N]``.

        Raises:
            ValidationError: NaN or Inf, or another width than before.
        """
        try:
            self._sum(layer, inputs)
        except ValidationError as error:
            raise error.within(layer[0]) from error

    def _sum(self, layer: LayerId, inputs: torch.Tensor) -> None:
        group = self._groups.get(layer)
        version = inputs._version  # noqa: SLF001  (a tensor changed in place is another input)
        same = next(
            (each for each in self._recent if each.tensor is inputs and each.version == version), None
        )
        if same is not None:
            if group is None:
                self._groups[layer] = same.group
                same.group.layers.append(layer)
            if self._groups[layer] is same.group:
                return
        if group is None:
            group = InputGroup([layer], self._accumulator(inputs.shape[-1]))
            self._groups[layer] = group
        elif group.layers[0] != layer:
            # What it shared until this pass it does not share any more.
            group.layers.remove(layer)
            group = InputGroup([layer], group.sums.copy())
            self._groups[layer] = group
        source = self.sources.get(layer)
        if source is not None and source.shape != inputs.shape:
            source = None
        if self.even:
            cut = _evening(inputs)
            evened = (inputs * cut).to(inputs.dtype)
            group.sums.add(evened, None if source is None else source * cut)
        else:
            group.sums.add(inputs, source)
        self._recent.append(_Recent(inputs, version, group))
        del self._recent[:-_RECENT]

    def _accumulator(self, columns: int) -> GramAccumulator:
        buffer = self.buffer(columns) if self.buffer and self.gram else None
        return GramAccumulator(columns, gram=self.gram, buffer=buffer)


@dataclass(slots=True)
class KeptInputs:
    """A sink that keeps what linear layers read in one pass, where it is one of ``counts`` vectors."""

    counts: Collection[int]
    inputs: dict[LayerId, torch.Tensor] = field(default_factory=dict)

    def take(self, reading: Reading) -> None:
        """Keep an input, or not."""
        inputs = reading.inputs
        if is_linear(reading.module) and inputs.numel() // max(inputs.shape[-1], 1) in self.counts:
            self.inputs[reading.id] = inputs

    def forget(self) -> None:
        """Nothing: they are wanted after the pass."""


def _evening(inputs: torch.Tensor) -> torch.Tensor:
    """What cuts vectors ``[..., N]`` longer than the median one to its length, fp32 ``[..., 1]``."""
    lengths = torch.linalg.vector_norm(inputs.float(), dim=-1, keepdim=True)
    cut: torch.Tensor = (lengths.median() / lengths.clamp_min(1e-30)).clamp_(max=1)
    return cut
