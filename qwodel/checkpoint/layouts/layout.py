"""What a layout decides: the tensors a weight becomes, the header, the files around the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qwodel.checkpoint.files.output_tensor import OutputTensor
from qwodel.checkpoint.formats.storage_format import StorageFormat
from qwodel.checkpoint.source.source_tensor import SourceTensor
from qwodel.checkpoint.tensors import TensorPlan

__all__ = ["Layout", "ReaderSupport"]


@dataclass(frozen=True, slots=True)
class ReaderSupport:
    """Whether the layout's usual reader loads a format, and if not, why not and what does."""

    loads: bool
    reader: str
    reason: str = ""


class Layout(Protocol):
    """How quantized weights are named and described for one kind of reader."""

    @property
    def name(self) -> str: ...

    @property
    def single_file(self) -> bool:
        """Whether everything goes into one file, whatever its size."""

    def support(self, wanted: StorageFormat) -> ReaderSupport:
        """Say whether the layout's reader loads ``wanted``.

        Raises:
            ConfigurationError: the layout cannot even express it.
        """

    def obstacle(self, source: SourceTensor, wanted: StorageFormat) -> str | None:
        """Say why the reader cannot load this one weight in ``wanted``, although it loads others; else ``None``."""

    def outputs(self, source: SourceTensor, wanted: StorageFormat) -> tuple[OutputTensor, ...]:
        """Return the tensors one quantized weight becomes: codes, scale, description."""

    def extra_tensors(self, tensors: Sequence[TensorPlan]) -> tuple[OutputTensor, ...]:
        """Return constants that belong to the file as a whole."""

    def metadata(self, tensors: Sequence[TensorPlan], source: dict[str, str]) -> dict[str, str]:
        """Return the header's string metadata, given the source's."""
