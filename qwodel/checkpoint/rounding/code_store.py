"""A scratch folder of codes that were found while a model was run, until the checkpoint is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from qwodel.algorithms.quant_types import Granularity, quant_type
from qwodel.algorithms.scales import Quantized
from qwodel.exceptions import ConversionError

__all__ = ["CodeStore"]

_INDEX = "index.json"


@dataclass(slots=True)
class CodeStore:
    """Codes and scales by layer name, one file for each set of layers that was added.

    Args:
        folder: an existing folder.
    """

    folder: Path
    _files: dict[str, str] = field(default_factory=dict)

    def add(self, layers: Mapping[str, Quantized]) -> None:
        """Keep the codes of some layers."""
        if not layers:
            return
        name = f"{len(set(self._files.values())):05d}.safetensors"
        tensors = {}
        for layer, codes in layers.items():
            tensors[f"{layer}.codes"] = codes.codes.contiguous()
            tensors[f"{layer}.scale"] = codes.scale.contiguous()
        kinds = {layer: f"{codes.quant_type} {codes.granularity}" for layer, codes in layers.items()}
        save_file(tensors, self.folder / name, kinds)
        self._files |= dict.fromkeys(layers, name)
        (self.folder / _INDEX).write_text(json.dumps(self._files), "utf-8")

    def get(self, layer: str) -> Quantized:
        """The codes of ``layer``.

        Raises:
            ConversionError: none were kept.
        """
        if not self._files:
            self._files.update(json.loads((self.folder / _INDEX).read_text("utf-8")))
        if layer not in self._files:
            raise ConversionError("no codes were found for it while the model was run")
        with safe_open(self.folder / self._files[layer], "pt") as file:
            kind, granularity = file.metadata()[layer].split(" ")
            return Quantized(
                file.get_tensor(f"{layer}.codes"),
                file.get_tensor(f"{layer}.scale"),
                quant_type(kind),
                Granularity.parse(granularity),
            )
