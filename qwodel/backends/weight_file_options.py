"""Options that the FP8 and INT8 backends share."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from qwodel.backends.base import BackendOptions
from qwodel.calibration.options import CalibrationBatches
from qwodel.checkpoint.plan.recipe import DEFAULT_SHARD_SIZE
from qwodel.checkpoint.rounding.registry import METHODS, rounding_method

__all__ = ["WeightFileOptions"]

LayoutName = Literal["auto", "comfyui", "transformers"]

_METHODS = ", ".join(f"{method.name} {method.summary}" for method in METHODS.values())


def _known_method(name: str) -> str:
    return name if name == "auto" else rounding_method(name).name


Optimizer = Annotated[str, AfterValidator(_known_method)]


class WeightFileOptions(CalibrationBatches, BackendOptions):
    """What an FP8 or INT8 run can be told."""

    settings: ClassVar[tuple[str, ...]] = tuple(
        name
        for name in CalibrationBatches.settings
        if name != "seed"  # learned rounding has one too
    )

    layout: LayoutName = Field(
        "auto", description="comfyui: one file; transformers: a model directory; auto goes by what was given."
    )
    optimizer: Optimizer = Field(
        "auto",
        description=f"How codes are chosen: {_METHODS}; auto is gptq with calibration data, else none or search by format.",
    )
    calibration_data_path: str | None = Field(
        None, description="Statistics collected before, by qwodel calibrate or collect_statistics."
    )
    damping: float | None = Field(
        None,
        gt=0,
        le=1,
        description="gptq, gptaq, quip: share of the mean diagonal added to the Gram matrix; 0.03.",
    )
    act_order: bool | None = Field(
        None, description="gptq, gptaq, quip: columns with the largest inputs first; on."
    )
    num_iter: int | None = Field(None, ge=0, description="Learned rounding: the most iterations a matrix.")
    lr: float | None = Field(None, gt=0, description="Learned rounding: the first learning rate.")
    lr_schedule: str | None = Field(None, description="Learned rounding: adaptive, plateau or exponential.")
    top_p: float | None = Field(None, description="Learned rounding: share of singular values looked at.")
    min_k: int | None = Field(None, description="Learned rounding: fewest singular vectors.")
    max_k: int | None = Field(None, description="Learned rounding: most singular vectors.")
    full_matrix: bool | None = Field(None, description="Learned rounding: full SVD.")
    seed: int | None = Field(None, description="Learned rounding: seed of the randomized SVD.")
    block_size: int | None = Field(None, gt=0, description="Side of scale blocks, for block formats; 128.")
    filters: tuple[str, ...] | None = Field(
        None, description="Model filters to apply, such as flux or wan; unset detects the family from names."
    )
    exclude_layers: str | None = Field(
        None, description="Regular expression of tensors to leave as they are."
    )
    custom_layers: str | None = Field(
        None, description="Regular expression of layers that get custom_format, whatever the filters say."
    )
    custom_format: str | None = Field(None, description="Format of custom_layers, such as int8_row or fp16.")
    fallback: str | None = Field(
        None,
        description="Format of layers that the model's filters or their shape keep out; unset keeps them.",
    )
    skip_inefficient_layers: bool = Field(
        False, description="Leave out layers with a side below the block size or not a multiple of it."
    )
    layer_config: str | dict[str, Any] | None = Field(
        None, description="Per-layer rules: a JSON file or its content."
    )
    layer_config_fullmatch: bool = Field(False, description="Rules must match whole layer names.")
    nonfinite: Literal["error", "keep"] = Field(
        "error", description="Weights with NaN or Inf: an error, or kept in their own dtype."
    )
    loras: tuple[str | tuple[str, float], ...] = Field(
        (), description="LoRA files to merge first, each a path or (path, scale)."
    )
    lora_dampen: bool = Field(True, description="Count the k-th LoRA 0.9^k.")
    allow_unmatched_loras: bool = Field(False, description="Skip LoRA layers that fit no weight.")
    activations: Literal["dynamic", "none"] = Field(
        "dynamic", description="transformers layout: whether readers quantize activations token by token."
    )
    full_precision_matrix_mult: bool = Field(
        False, description="comfyui layout: compute with de-quantized weights."
    )
    input_scale: bool = Field(False, description="comfyui layout: write activation scales of 1.0.")
    save_quant_metadata: bool = Field(False, description="comfyui layout: describe layers in the header too.")
    legacy_names: bool = Field(False, description="comfyui layout: scaled_fp8 names instead of descriptions.")
    max_shard_size: int = Field(DEFAULT_SHARD_SIZE, gt=0, description="transformers layout: bytes a shard.")
    workers: int = Field(
        1, ge=1, description="Processes that work on tensors on the CPU; the bytes are the same."
    )
    device: str = Field(
        "cpu",
        description="Where codes are computed: cpu, cuda, cuda:N, or auto for CUDA where there is one.",
    )
