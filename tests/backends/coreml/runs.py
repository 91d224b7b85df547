"""A finished run of the backend, and sizes of tiny models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwodel import Quantizer
from qwodel.backends.coreml.mil.evaluate import Evaluator
from qwodel.backends.coreml.mil.program import Program

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "vocab_size": 320, "max_position_embeddings": 128,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Made:
    """A finished run: its folder, the report, and its program."""

    folder: Path
    info: Mapping[str, Any]

    @property
    def package(self) -> Path:
        return self.folder / self.info["package"]

    @property
    def program(self) -> Program:
        return Program(self.package)

    def run(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return Evaluator(self.program).run(inputs)


def make(model: Path, out: Path, name: str, **options: Any) -> Made:
    """Run the backend through the facade."""
    quantizer = Quantizer("coreml", model, out, **options)
    return Made(quantizer.quantize(name), quantizer.get_model_info())
