"""The full-precision model an export starts from, and the smoothed checkpoint it is quantized from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwodel.exceptions import ConversionError, ValidationError
from qwodel.process_state import MODEL_BUILDING
from qwodel.side_files import copy_side_files, side_files
from qwodel.smoothquant.int8_loading import checkpoint_dtype
from qwodel.smoothquant.simulate import quantizable_layers
from qwodel.smoothquant.stacked_experts import EXPERT_WEIGHTS, stacked_experts

__all__ = ["load_float", "name_of", "refuse_conv1d", "save_smoothed"]


def load_float(source: Path, config: Mapping[str, Any]) -> Any:
    """A causal language model in fp32.

    Raises:
        ValidationError: it is quantized already, or ``unsupported model architecture …``.
        ConversionError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    if config.get("quantization_config"):
        raise ValidationError(
            f"{source.name} is quantized already",
            hint="start from the original weights; a second quantization loses twice",
        )
    try:
        with MODEL_BUILDING:
            return AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, local_files_only=True
            ).eval()
    except MemoryError:
        raise
    except Exception as error:
        # transformers raises what its many model classes raise.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "Unrecognized configuration class" in reason or "does not recognize this architecture" in reason:
            name = next(iter(config.get("architectures") or [config.get("model_type")]))
            raise ValidationError(
                f"unsupported model architecture {name}: it is no causal language model"
            ) from error
        raise ConversionError(f"transformers cannot load {source.name}: {reason}") from error


def refuse_conv1d(model: nn.Module) -> None:
    """Raise a :class:`ValidationError` where transposed layers stand, which no reader would take."""
    if any(type(each).__name__ == "Conv1D" for each in quantizable_layers(model).values()):
        raise ValidationError(
            f"unsupported model architecture {type(model).__name__} for compressed-tensors, which knows no Conv1D",
            hint="smooth it with smooth_lm and save Int8ForCausalLM.from_float(model), which takes Conv1D",
        )


def save_smoothed(model: Any, source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """Write the smoothed model: what will be quantized in fp32, the rest in the source's dtype."""
    dtype, keep = checkpoint_dtype(config), {f"{name}.weight" for name in quantizable_layers(model)}
    keep |= {f"{name}.{weight}" for name in stacked_experts(model) for weight in EXPERT_WEIGHTS}
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    state = {
        name: value if name in keep else value.to(dtype) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
        if not (tied and value.data_ptr() == head.weight.data_ptr() and name.startswith(name_of(model, head)))
    }
    model.save_pretrained(folder, state_dict=state)
    copy_side_files(side_files(source), folder)
    shutil.copyfile(source / "config.json", folder / "config.json")


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """The name of a module, or nothing."""
    return next((name for name, module in model.named_modules() if module is wanted), "")
