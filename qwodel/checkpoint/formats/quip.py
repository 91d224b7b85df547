"""INT8 rows in a basis that is rotated on both sides (QuIP): the least weight error, read by qwodel alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qwodel.algorithms.hadamard import Basis, Rotation
from qwodel.algorithms.quant_types import INT8, ROW
from qwodel.algorithms.quip import QuipTransform
from qwodel.checkpoint.files.output_tensor import Role
from qwodel.checkpoint.formats.codec import (
    COMFYUI,
    Activations,
    Dialect,
    Part,
    ReaderSupport,
    RowDecoder,
    TensorSource,
)
from qwodel.checkpoint.formats.convrot import needs_rotated_inputs
from qwodel.checkpoint.formats.scaled import Scaled, ScaledDecoder, scaled_codes
from qwodel.checkpoint.formats.stated import Recognised, StoredTensors

__all__ = ["QUIP", "QuipDecoder", "QuipRows", "recognise_quip"]

_LABEL = "int8_quip"


@dataclass(frozen=True, slots=True)
class QuipDecoder(RowDecoder):
    """QuIP weights: scaled codes whose rows and columns are rotated; any row takes all of them.

    Attributes:
        rotated: decodes the rotated weight.
        shape: the weight's shape.
        signs_out, signs_in: names of the rotations' signs.
    """

    rotated: ScaledDecoder
    shape: tuple[int, int]
    signs_out: str
    signs_in: str

    @property
    def scaled(self) -> ScaledDecoder:
        """The codes and scales of the rotated weight."""
        return self.rotated

    @property
    def whole(self) -> bool:
        """Always: outputs are rotated too."""
        return True

    def basis(self, reader: TensorSource) -> Basis:
        """The rotations of outputs and inputs, from their stored signs."""
        outputs = Rotation.from_signs(reader.get_tensor(self.signs_out))
        return QuipTransform(outputs, Rotation.from_signs(reader.get_tensor(self.signs_in)))

    def rows(self, reader: TensorSource, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` of the whole weight rotated back."""
        whole = self.rotated.rows(reader, 0, self.shape[0])
        return self.basis(reader).restore(whole.float())[start:stop].to(whole.dtype)


@dataclass(frozen=True, slots=True)
class QuipRows(Scaled):
    """``int8_row`` of a weight rotated by the random Hadamard transforms of a seed.

    Attributes:
        seed: of the transforms' signs, which are written beside the codes.
    """

    seed: int = 0

    @property
    def mixes_rows(self) -> bool:
        """Always: outputs are rotated too."""
        return True

    @property
    def rotates(self) -> bool:
        """Always: readers must rotate inputs and outputs."""
        return True

    def basis(self, shape: tuple[int, ...]) -> QuipTransform:
        """Rotations of both sides of ``[M, N]``, drawn from the format's seed."""
        return QuipTransform.seeded((shape[0], shape[1]), self.seed)

    def parts(self, shape: tuple[int, ...], dialect: Dialect) -> tuple[Part, ...]:
        """``int8_row``'s parts, and the signs ±1 of each side as int8 constants."""
        basis, signs = self.basis(shape), []
        for side, rotation in (("out", basis.outputs), ("in", basis.inputs)):
            assert rotation is not None
            payload = rotation.signs.to(torch.int8).numpy().tobytes()
            signs.append(Part(f"quip_signs_{side}", "I8", (rotation.size,), Role.CONSTANT, payload))
        return (*Scaled.parts(self, shape, dialect), *signs)

    def decoder(self, names: Mapping[str, str], shape: tuple[int, ...], dialect: Dialect) -> RowDecoder:
        """The scaled rows' decoder, with both rotations undone."""
        plain = Scaled.decoder(self, names, shape, dialect)
        assert isinstance(plain, ScaledDecoder)
        return QuipDecoder(plain, (shape[0], shape[1]), names["quip_signs_out"], names["quip_signs_in"])

    def comfyui(self) -> ReaderSupport:
        """ComfyUI does not load it; the reason says what does."""
        return ReaderSupport(False, COMFYUI, "its codes are rotated; qwodel.int8.read_weights decodes them")

    def comfyui_description(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """``int8_row``'s description under a label of its own."""
        return {**Scaled.comfyui_description(self, shape), "format": _LABEL}

    def compressed_tensors(self, activations: Activations) -> ReaderSupport:
        """Raise ConfigurationError: no reader of that layout rotates inputs."""
        del activations
        raise needs_rotated_inputs(self)


QUIP = QuipRows(
    "int8_quip",
    INT8,
    ROW,
    backend="int8",
    description="INT8 in a basis rotated on both sides: the least weight error; NOT loadable by ComfyUI or vLLM, "
    "only qwodel.int8.read_weights decodes it",
    read_by="qwodel",
)


def recognise_quip(stored: StoredTensors, name: str) -> Recognised | None:
    """INT8 rows whose description says that they are rotated on both sides.

    Raises:
        ValidationError: the signs of the rotations are not there.
    """
    if stored.description(name).get("format") != _LABEL or stored.reader.entry(name).dtype != "I8":
        return None
    plain = scaled_codes(stored, name)
    if plain is None:
        return None
    layer = name.removesuffix(".weight")
    signs = (f"{layer}.quip_signs_out", f"{layer}.quip_signs_in")
    shapes = [(stored.reader.get_shape(sign) if sign in stored.reader else ()) for sign in signs]
    rows, columns = plain.shape
    if shapes != [(rows,), (columns,)]:
        raise stored.refusal(f"QuIP without the signs of its rotations (tensor {name!r})")
    assert isinstance(plain.decoder, ScaledDecoder)
    decoder = QuipDecoder(plain.decoder, (rows, columns), *signs)
    return Recognised(name, plain.shape, (*plain.stored, *signs), decoder, "INT8 QuIP")
