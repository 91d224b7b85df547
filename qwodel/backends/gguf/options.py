"""Options of the GGUF backend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from qwodel.backends.base import BackendOptions
from qwodel.calibration.options import CalibrationText, Dataset
from qwodel.exceptions import did_you_mean
from qwodel.gguf_header import GGML_TYPES
from qwodel.name_patterns import name_pattern

__all__ = ["GGUFOptions"]

_NOT_TARGETS = {"Q8_K", "I8", "I16", "I32", "I64", "F64", "NVFP4"}
_TYPES = {name.casefold(): name for name, _, _ in GGML_TYPES.values() if name not in _NOT_TARGETS}


def _ggml_type(value: str) -> str:
    """Return ggml's spelling of a tensor type."""
    name = _TYPES.get(value.strip().casefold())
    if name is None:
        near = did_you_mean(value, _TYPES.values())
        raise ValueError(f"{value!r} is no tensor type; {near or 'types: ' + ', '.join(_TYPES.values())}")
    return name


def _pattern(value: str) -> str:
    name_pattern(value)
    return value


GGMLType = Annotated[str, AfterValidator(_ggml_type)]


class GGUFOptions(CalibrationText, BackendOptions):
    """What a GGUF run can be told; every one has a default that suits most models."""

    nthread: int = Field(
        0, ge=0, description="Threads for quantizing and for the forward passes; 0 takes all cores."
    )
    pure: bool = Field(
        False, description="Give every tensor the format's main type instead of llama.cpp's mixture."
    )
    allow_requantize: bool = Field(
        False, description="Quantize a GGUF that is quantized already (quality suffers twice)."
    )
    output_tensor_type: GGMLType | None = Field(None, description="Type of the output matrix, such as Q8_0.")
    token_embedding_type: GGMLType | None = Field(
        None, description="Type of the token embeddings, such as Q8_0."
    )
    tensor_types: dict[Annotated[str, AfterValidator(_pattern)], GGMLType] = Field(
        default_factory=dict, description="Regular expression over tensor names → type; the first match wins."
    )
    imatrix: Path | None = Field(
        None, description="Importance matrix to use: llama.cpp's GGUF or legacy file."
    )
    calibration_dataset: Dataset | None = Field(
        None,
        description="Text to compute an importance matrix from: a file, a directory, a hub dataset, or texts.",
    )
    calibration_split: str = Field("train", description="Split of a hub dataset.")
    num_samples: int = Field(128, ge=1, description="Most samples of seq_length tokens to calibrate on.")
    seq_length: int = Field(
        512, ge=16, description="Tokens a calibration sample; cut to the model's context."
    )
    keep_intermediate: bool = Field(False, description="Publish the unquantized GGUF beside the result.")
