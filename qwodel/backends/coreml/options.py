"""Options of the Core ML backend."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from qwodel.backends.base import BackendOptions

__all__ = ["ComputeUnits", "CoreMLOptions", "Granularity", "Target"]

ComputeUnits = Literal["ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"]
Target = Literal["iOS15", "iOS16", "iOS17", "iOS18", "macOS12", "macOS13", "macOS14", "macOS15"]
Granularity = Literal["per_tensor", "per_channel", "per_block", "per_grouped_channel"]


class CoreMLOptions(BackendOptions):
    """What a Core ML run can be told."""

    input_shape: tuple[int, ...] = Field(
        (1, 512),
        description="(batch, tokens) the model is traced with; (1, channels, height, width) for images; "
        "the one input's shape for a TorchScript file.",
    )
    compute_units: ComputeUnits = Field(
        "ALL", description="Where the model is meant to run: ALL, CPU_ONLY, CPU_AND_GPU or CPU_AND_NE."
    )
    seq_length: int = Field(512, ge=1, description="Most tokens the model takes; cut to its context.")
    shapes: Literal["range", "enumerated", "fixed"] = Field(
        "range",
        description="Token counts taken: any up to seq_length, the listed lengths, or seq_length alone.",
    )
    lengths: tuple[int, ...] | None = Field(
        None, description="Token counts for shapes=enumerated; unset takes powers of two up to seq_length."
    )
    stateful: bool = Field(False, description="Decoders: keep keys and values in Core ML states (iOS 18).")
    token_type_ids: bool = Field(False, description="Encoders: a third input with segment ids.")
    deployment_target: Target | None = Field(
        None, description="Oldest system, such as iOS17; unset takes the oldest the format runs on."
    )
    granularity: Granularity | None = Field(
        None,
        description="What shares a scale (int8: per_tensor, per_channel, per_block) or a palette "
        "(int4, int6: per_tensor, per_grouped_channel).",
    )
    group_size: int | None = Field(
        None, ge=1, description="Inputs a block (int8), or channels a palette (int4, int6); 32."
    )
    mode: Literal["linear", "linear_symmetric", "kmeans", "uniform"] | None = Field(
        None, description="How codes are chosen; int4 and int6 take kmeans or uniform."
    )
    weight_threshold: int = Field(
        2048, ge=0, description="Weights of up to so many elements stay in float16."
    )
    exclude_layers: tuple[str, ...] = Field(
        (), description="Weights to leave in float16: parameter or layer names, or re: and an expression."
    )
    exclude_ops: tuple[str, ...] = Field(
        (),
        description="Leave the weights of these MIL operations in float16: gather (embeddings), linear, conv …",
    )
    float32_ops: tuple[str, ...] = Field(
        (), description="MIL operations to compute in float32, such as reduce_mean where norms overflow."
    )
    workers: int = Field(0, ge=0, description="Threads for k-means; 0 takes all cores.")
    evaluate: bool | None = Field(
        None,
        description="Run the written program on the CPU and compare its outputs; unset does so up to 300 M parameters.",
    )
    example_inputs: Any = Field(
        None,
        exclude=True,
        description="Inputs of a TorchScript file: tensors, or a file of them (.pt, .safetensors, .npz).",
    )
    trust_program: bool = Field(
        False,
        description="Open a TorchScript file or a .pt2, which can run code: only where you trust who made it.",
    )
    trust_remote_code: bool = Field(
        False,
        description="Run the Python code that comes with a model whose class transformers does not have.",
    )

    @field_validator("compute_units", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("input_shape")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or any(size < 1 for size in value):
            raise ValueError("every size must be at least 1")
        return value

    @field_validator("example_inputs", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="after")
    def _lengths_are_used(self) -> CoreMLOptions:
        if self.lengths is not None:
            if self.shapes != "enumerated":
                raise ValueError("lengths belong to shapes='enumerated'")
            if not self.lengths or min(self.lengths) < 1:
                raise ValueError("lengths must be at least 1")
        return self
