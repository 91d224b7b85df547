"""One tensor of an output file, known before its bytes are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from qwodel.checkpoint.files.dtypes import nbytes

__all__ = ["OutputTensor", "Role"]


class Role(StrEnum):
    """Where the bytes of an output tensor come from."""

    DATA = "data"
    CODES = "codes"
    SCALE = "scale"
    CONSTANT = "constant"


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output: ``payload`` holds its bytes when they are known beforehand.

    ``local`` is its name among the tensors of its layer, as the layer's format knows it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: Role
    payload: bytes | None = None
    local: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return nbytes(self.dtype, self.shape)
