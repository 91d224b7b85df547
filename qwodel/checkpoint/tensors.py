"""What a tensor becomes: the decision for it, the tensors that are written, the updates merged first."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from qwodel.checkpoint.files.output_tensor import OutputTensor
from qwodel.checkpoint.formats.storage_format import StorageFormat
from qwodel.checkpoint.lora.merge import LoraTerm
from qwodel.checkpoint.rounding.methods import Rounding
from qwodel.checkpoint.source.source_tensor import SourceTensor

__all__ = ["Action", "TensorPlan"]


class Action(StrEnum):
    """What is done with a tensor."""

    QUANTIZE = "quantize"
    CAST = "cast"
    COPY = "copy"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one tensor.

    Attributes:
        source: where its numbers come from.
        action, reason: the decision.
        format, rounding: where it is quantized or cast.
        outputs: the tensors it becomes; none when dropped.
        loras: updates merged into it first.
    """

    source: SourceTensor
    action: Action
    reason: str
    outputs: tuple[OutputTensor, ...]
    format: StorageFormat | None = None
    rounding: Rounding | None = None
    loras: tuple[LoraTerm, ...] = ()

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
