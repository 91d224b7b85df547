"""What a tensor becomes: the decision for it, the tensors that are written, the updates merged first."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from qwodel.checkpoint.files.output_tensor import OutputTensor
from qwodel.checkpoint.formats.codec import Codec, Dialect
from qwodel.checkpoint.lora.merge import LoraTerm
from qwodel.checkpoint.rounding.methods import Rounding
from qwodel.checkpoint.source.source_tensor import SourceTensor

__all__ = ["Action", "Storage", "TensorPlan"]


class Action(StrEnum):
    """What is done with a tensor."""

    QUANTIZE = "quantize"
    CAST = "cast"
    COPY = "copy"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Storage:
    """A format in the dialect of a layout: what one weight is really written as."""

    codec: Codec
    dialect: Dialect

    def outputs(self, layer: str, shape: tuple[int, ...]) -> tuple[OutputTensor, ...]:
        """The tensors of a weight of this layer and shape."""
        return tuple(
            OutputTensor(f"{layer}.{part.local}", part.dtype, part.shape, part.role, part.payload, part.local)
            for part in self.codec.parts(shape, self.dialect)
        )


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one tensor.

    Attributes:
        source: where its numbers come from.
        action, reason: the decision.
        format, rounding: where it is quantized or cast.
        outputs: the tensors it becomes; none when dropped.
        loras: updates merged into it first.
        storage: what ``format`` is written as.
    """

    source: SourceTensor
    action: Action
    reason: str
    outputs: tuple[OutputTensor, ...]
    format: Codec | None = None
    rounding: Rounding | None = None
    loras: tuple[LoraTerm, ...] = ()
    storage: Storage | None = None

    @property
    def name(self) -> str:
        """The tensor's name in the source."""
        return self.source.name

    @property
    def output_bytes(self) -> int:
        """Bytes of its output tensors."""
        return sum(tensor.nbytes for tensor in self.outputs)

    @property
    def becomes(self) -> str:
        """What it becomes, in a word or two."""
        if self.action is not Action.QUANTIZE or not self.format:
            merged = " + LoRA" if self.loras else ""
            return (f"{self.format.cast_to}" if self.format else str(self.action)) + merged
        return f"{self.format.quant_type} {self.format.granularity}" + (" + LoRA" if self.loras else "")
