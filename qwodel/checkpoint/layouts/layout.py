"""What a layout decides: the tensors a weight becomes, the header, the files around the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qwodel.checkpoint.files.output_tensor import OutputTensor
from qwodel.checkpoint.files.writer import FilePlan
from qwodel.checkpoint.formats.codec import Codec, ReaderSupport
from qwodel.checkpoint.source.source_tensor import SourceTensor
from qwodel.checkpoint.tensors import Storage, TensorPlan

__all__ = ["Layout"]


class Layout(Protocol):
    """How quantized weights are named and described for one kind of reader."""

    @property
    def name(self) -> str:
        """What users write to choose it."""

    @property
    def single_file(self) -> bool:
        """Whether everything goes into one file, whatever its size."""

    @property
    def needs_config(self) -> bool:
        """Whether the quantization is described in the model's ``config.json``, so that there must be one."""

    def support(self, wanted: Codec) -> ReaderSupport:
        """Say whether the layout's reader loads ``wanted``.

        Raises:
            ConfigurationError: the layout cannot even express it.
        """

    def obstacle(self, source: SourceTensor, wanted: Codec) -> str | None:
        """Say why the reader cannot load this one weight in ``wanted``, although it loads others; else ``None``."""

    def storage(self, source: SourceTensor, wanted: Codec) -> Storage:
        """Return what a weight is really written as where ``wanted`` was decided for it."""

    def outputs(self, source: SourceTensor, wanted: Codec) -> tuple[OutputTensor, ...]:
        """Return the tensors one quantized weight becomes: codes, scale, description."""

    def extra_tensors(self, tensors: Sequence[TensorPlan]) -> tuple[OutputTensor, ...]:
        """Return constants that belong to the file as a whole."""

    def metadata(self, tensors: Sequence[TensorPlan], source: dict[str, str]) -> dict[str, str]:
        """Return the header's string metadata, given the source's."""

    def documents(
        self, config: Mapping[str, Any], tensors: Sequence[TensorPlan], files: Sequence[FilePlan]
    ) -> dict[str, bytes]:
        """Return the files to write beside the weights, by name; none where the layout needs no ``config.json``."""
