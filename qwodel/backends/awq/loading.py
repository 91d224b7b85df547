"""Loading a model from a directory, for calibration and for reading back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwodel.exceptions import ConversionError, ValidationError

__all__ = ["check_architecture", "load_model"]


def check_architecture(config: Mapping[str, Any]) -> str:
    """Return the transformers class a configuration names.

    Raises:
        ValidationError: it names none that generates text, or the weights are quantized already.
    """
    names = config.get("architectures") or []
    generating = [
        name for name in names if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    ]
    if not generating:
        shown = ", ".join(names) or config.get("model_type") or "none"
        raise ValidationError(
            f"unsupported model architecture {shown}: AWQ needs a model that generates text",
            hint="config.json must name an architecture such as LlamaForCausalLM",
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValidationError(
            f"the model is quantized already ({method})",
            hint="start from the original weights; a second quantization loses twice",
        )
    return str(generating[0])


def load_model(path: Path, architecture: str, *, linear_experts: bool = False) -> Any:
    """Load a model on the CPU in its checkpoint's dtype, in evaluation mode.

    Args:
        path: a model directory.
        architecture: from :func:`check_architecture`.
        linear_experts: take stacked experts apart into linear layers, which can be quantized.

    Raises:
        ConversionError: transformers cannot load it.
    """
    import transformers
    from llmcompressor.modeling.moe.linearize import linearize_moe

    kind = (
        transformers.AutoModelForImageTextToText
        if architecture.endswith("ForConditionalGeneration")
        else transformers.AutoModelForCausalLM
    )
    try:
        model = kind.from_pretrained(path, dtype="auto", local_files_only=True).eval()
        # llm-compressor's loader for experts leaves its patches in transformers when it fails.
        return linearize_moe(model) if linear_experts else model
    except MemoryError:
        raise
    except Exception as error:
        # transformers raises what its many model classes raise.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConversionError(f"transformers cannot load {path.name}: {reason}") from error
