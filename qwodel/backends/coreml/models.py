"""Which models are taken, and how each is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from qwodel.backends.coreml.options import CoreMLOptions
from qwodel.backends.coreml.toolchain import memory_errors
from qwodel.exceptions import ConversionError, QuantizationError, ValidationError
from qwodel.process_state import MODEL_BUILDING
from qwodel.source import ModelSource

__all__ = ["ModelKind", "classify", "load_model"]


class ModelKind(Enum):
    """What a model takes and gives."""

    DECODER = "decoder"
    ENCODER = "encoder"
    VISION = "vision model"
    PROGRAM = "traced program"


_DECODER = re.compile(r"(ForCausalLM|LMHeadModel)$")
_VISION_HEAD = re.compile(r"ForImageClassification$")
_ENCODER_HEAD = re.compile(
    r"(ForMaskedLM|ForSequenceClassification|ForTokenClassification|ForQuestionAnswering)$"
)
_BACKBONE = re.compile(r"Model$")
_VISION_TYPES = frozenset(
    ("beit", "convnext", "convnextv2", "cvt", "deit", "dinov2", "efficientnet", "focalnet", "levit", "mobilenet_v1",
     "mobilenet_v2", "mobilevit", "mobilevitv2", "poolformer", "pvt", "regnet", "resnet", "segformer", "swin", "swinv2",
     "vit", "vit_msn")
)  # fmt: skip
# Causal by construction, whatever head they wear.
_CAUSAL = re.compile(
    r"^(Llama|Qwen|Mistral|Mixtral|Gemma|Phi|GPT|Gpt|Olmo|SmolLM|Falcon|Bloom|OPT|StableLm|Granite|Cohere)"
)
_DATA_DEPENDENT = {
    "num_local_experts": "routes tokens to experts",
    "num_experts": "routes tokens to experts",
    "n_routed_experts": "routes tokens to experts",
    "state_size": "has recurrent state-space layers",
    "ssm_state_size": "has recurrent state-space layers",
}


def classify(config: Mapping[str, Any]) -> ModelKind:
    """Tell from ``config.json`` what kind of model it is.

    Raises:
        ValidationError: this kind cannot be made into a Core ML package here; the message says why.
    """
    architecture = next(iter(config.get("architectures") or []), None)
    if architecture is None:
        raise ValidationError(
            "config.json names no architecture",
            hint='give it the key "architectures", such as ["LlamaForCausalLM"]',
        )
    problem = _problem(architecture, config)
    if problem:
        raise ValidationError(
            f"the coreml backend does not take {architecture}: {problem}",
            hint="it takes decoders (…ForCausalLM), encoders and their task heads, and image classifiers; "
            "for anything else trace the model yourself and give the TorchScript file",
        )
    if _DECODER.search(architecture):
        return ModelKind.DECODER
    if _VISION_HEAD.search(architecture) or config.get("model_type") in _VISION_TYPES:
        return ModelKind.VISION
    return ModelKind.ENCODER


def _problem(architecture: str, config: Mapping[str, Any]) -> str | None:
    if config.get("is_encoder_decoder"):
        return "an encoder with a decoder is two programs"
    if "vision_config" in config or "audio_config" in config:
        return "it has several modalities"
    if config.get("quantization_config"):
        return "its weights are quantized already; start from the original ones"
    for key, why in _DATA_DEPENDENT.items():
        if isinstance(config.get(key), int) and config[key] > 1:
            return f"it {why}, which a traced program cannot do"
    known = (_DECODER, _VISION_HEAD, _ENCODER_HEAD, _BACKBONE)
    if not any(pattern.search(architecture) for pattern in known):
        return "its inputs and outputs are not known"
    if _CAUSAL.match(architecture) and not _DECODER.search(architecture):
        return "a decoder is taken with its language-model head"
    return None


def load_model(source: ModelSource, options: CoreMLOptions) -> Any:
    """Load a Hugging Face directory in float32 on the CPU, in evaluation mode.

    Raises:
        ValidationError: transformers has no such class, or weights are missing.
        ConversionError: transformers fails on the files; its error is chained.
    """
    import transformers

    architecture = source.config["architectures"][0]
    remote = architecture in str(source.config.get("auto_map", "")) or not hasattr(transformers, architecture)
    loader = _remote_class(source, architecture, options) if remote else getattr(transformers, architecture)
    try:
        extra = {"trust_remote_code": True} if remote else {}
        with MODEL_BUILDING, memory_errors(f"{source.name} was loaded"):
            model, info = loader.from_pretrained(
                Path(source.path),
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                **extra,
            )
    except QuantizationError:
        raise
    except Exception as error:
        raise ConversionError(
            f"transformers cannot load {source.name} as {architecture}: {str(error).splitlines()[0] if str(error) else error!r}",
            hint="check that the files are complete and belong together",
        ) from error
    if getattr(model, "main_input_name", "input_ids") not in ("input_ids", "pixel_values"):
        raise ValidationError(
            f"{architecture} takes {model.main_input_name}, and the coreml backend makes models of text and images",
            hint="trace the model yourself and give the TorchScript file",
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValidationError(
            f"{source.name} lacks {len(missing)} weights of {architecture}, such as {missing[0]}",
            hint='correct "architectures" in config.json, or give the checkpoint with the trained head',
        )
    return model.eval().requires_grad_(False)


def _remote_class(source: ModelSource, architecture: str, options: CoreMLOptions) -> Any:
    import transformers

    auto_map = source.config.get("auto_map") or {}
    names = [name for name, target in auto_map.items() if str(target).endswith(architecture)]
    if not names:
        raise ValidationError(
            f"transformers {transformers.__version__} has no class {architecture}, and the model brings none",
            hint="check the name in config.json, or install a transformers release that has it",
        )
    if not options.trust_remote_code:
        raise ValidationError(
            f"{architecture} is Python code that comes with the model, and it is not run unless you ask for it",
            hint="read the .py files in the model's folder; if you trust them, pass trust_remote_code=True",
        )
    return getattr(transformers, names[0])
