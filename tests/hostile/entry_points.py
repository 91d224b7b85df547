"""Every place where a file of others comes in, by name. ``prepare(folder)`` returns an ``Attempt``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.hostile import segquant_files, side_files, weight_files
from tests.hostile.weight_files import Attempt

__all__ = ["ENTRY_POINTS"]

ENTRY_POINTS: Mapping[str, Callable[[Path], Attempt]] = {
    "inspect a .safetensors file": weight_files.safetensors,
    "inspect a .bin file": weight_files.pickled,
    "inspect a .gguf file": weight_files.gguf,
    "inspect a model directory": weight_files.model_directory,
    "quantize() to int8": weight_files.quantized,
    "calibration data": side_files.calibration_data,
    "layer rules": side_files.layer_rules,
    "LoRA adapters": side_files.lora,
    "importance matrices": side_files.importance_matrix,
    "activation statistics": side_files.statistics,
    "activation scales": side_files.activation_scales,
    "segquant: saved models": segquant_files.saved_model,
    "segquant: calibration sets": segquant_files.calibration_set,
    "segquant: affiners": segquant_files.affiner,
}
