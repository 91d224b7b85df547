"""What is found in a network's graph: value objects, and the table people read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate, groupby, pairwise

__all__ = ["Finding", "Patterns", "SegPattern"]


class SegPattern(StrEnum):
    """What a linear layer is seen to be part of.

    Two patterns cut its outputs, three join its inputs, and the last says that an activation
    function feeds it, whose outputs are not symmetric about zero.
    """

    LINEAR2CHUNK = "linear2chunk"
    LINEAR2SPLIT = "linear2split"
    CONCAT2LINEAR = "concat2linear"
    STACK2LINEAR = "stack2linear"
    RESHAPE2LINEAR = "reshape2linear"
    ACTIVATION2LINEAR = "activation2linear"

    @classmethod
    def seg(cls) -> list[SegPattern]:
        """Return the patterns that give segments."""
        return [each for each in cls if each is not cls.ACTIVATION2LINEAR]

    @classmethod
    def all(cls) -> list[SegPattern]:
        """Return every pattern."""
        return list(cls)


_OUTPUT = (SegPattern.LINEAR2CHUNK, SegPattern.LINEAR2SPLIT)
_INPUT = (SegPattern.CONCAT2LINEAR, SegPattern.STACK2LINEAR, SegPattern.RESHAPE2LINEAR)


@dataclass(frozen=True, slots=True)
class Finding:
    """One seam.

    ``layer`` is the linear layer's name in ``model.named_modules()``. ``sizes`` are the segments
    along its outputs (LINEAR2CHUNK, LINEAR2SPLIT) or its inputs (CONCAT2LINEAR, STACK2LINEAR,
    RESHAPE2LINEAR), empty for ACTIVATION2LINEAR. ``source`` says what was seen.
    """

    layer: str
    pattern: SegPattern
    sizes: tuple[int, ...]
    source: str


@dataclass(frozen=True, slots=True)
class Patterns:
    """All findings of one model.

    ``method`` is what read the graph: ``torch.export``, ``torch.fx`` or ``hooks``. ``order`` names
    the linear and convolution layers in the order in which they first run.
    """

    findings: tuple[Finding, ...]
    method: str
    order: tuple[str, ...]

    def output_segments(self) -> dict[str, tuple[int, ...]]:
        """Return layer → sizes along its outputs, cut wherever any finding cuts."""
        return self._segments(_OUTPUT)

    def input_segments(self) -> dict[str, tuple[int, ...]]:
        """Return layer → sizes along its inputs, cut wherever any finding cuts."""
        return self._segments(_INPUT)

    def activations(self) -> dict[str, str]:
        """Return layer → the activation function that feeds it, as ``source`` names it."""
        return {
            each.layer: each.source for each in self.findings if each.pattern is SegPattern.ACTIVATION2LINEAR
        }

    def table(self) -> str:
        """Return a line a finding, in the order of execution: layer, pattern, segments, what was seen."""
        rows = [("layer", "pattern", "segments", "seen")]
        rows += [(each.layer, str(each.pattern), _short(each.sizes), each.source) for each in self.findings]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        found = f"{len(self.findings)} patterns in {len(self.order)} layers, read by {self.method}"
        return "\n".join([found, *(lines if self.findings else [])])

    def _segments(self, patterns: Iterable[SegPattern]) -> dict[str, tuple[int, ...]]:
        cuts: dict[str, set[int]] = {}
        for each in self.findings:
            if each.pattern in patterns:
                cuts.setdefault(each.layer, {0}).update(accumulate(each.sizes))
        return {
            layer: tuple(end - start for start, end in pairwise(sorted(points)))
            for layer, points in cuts.items()
        }


def _short(sizes: tuple[int, ...]) -> str:
    """Return ``6×1536``, or ``1024+4096`` where the sizes differ."""
    return "+".join(_runs(sizes))


def _runs(sizes: tuple[int, ...]) -> Iterator[str]:
    for size, group in groupby(sizes):
        count = len(list(group))
        yield f"{count}×{size}" if count > 1 else str(size)
