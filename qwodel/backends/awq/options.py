"""Options of the AWQ backend."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from qwodel.backends.base import BackendOptions
from qwodel.calibration import DEFAULT_DATASET
from qwodel.calibration.options import CalibrationBatches, Dataset
from qwodel.name_patterns import name_pattern

__all__ = ["AWQOptions"]


class AWQOptions(CalibrationBatches, BackendOptions):
    """What an AWQ run can be told; sizes that are not given follow from the free memory."""

    calibration_dataset: Dataset = Field(
        DEFAULT_DATASET,
        description="Text to calibrate on: a file, a directory, repo or repo:subset on the hub, texts, or token lists.",
    )
    calibration_split: str = Field("train", description="Split of a hub dataset.")
    text_column: str | None = Field(None, description="Text column of the dataset; found by name if unset.")
    batch_size: int | None = Field(None, ge=1, description="Sequences a forward pass; unset: by free memory.")
    seq_length: int | None = Field(
        None,
        ge=8,
        description="Tokens a sequence (seq_len for short); unset: by free memory. Cut to the model's context.",
    )
    num_samples: int | None = Field(
        None, ge=1, description="Sequences to calibrate on; unset: by free memory."
    )
    seed: int = Field(0, description="Seed of the shuffle of the calibration set.")
    ignore: tuple[str, ...] = Field(
        (), description="Modules to leave as they are, beside the defaults: names, or re: and an expression."
    )
    default_ignore: bool = Field(
        True,
        description="Leave heads, routers, vision and audio towers, projectors and MTP layers as they are.",
    )
    symmetric: bool | None = Field(
        None, description="Weights without zero points; unset: with them, but for models with experts."
    )
    group_size: Literal["auto"] | int = Field(
        "auto",
        description="Columns that share a scale; auto: the largest of 128, 64, 32 that divides all; -1: whole rows.",
    )
    duo_scaling: bool | Literal["both"] = Field(
        True, description="Search scales from activations and weights; False: activations only; both: both."
    )
    n_grid: int = Field(20, ge=4, description="Points of the scale search.")
    moe_calibrate_all_experts: bool = Field(
        True, description="Send every calibration token through every expert, not only the routed ones."
    )
    max_shard_size: str = Field("5GB", description="Largest weight file, such as 5GB or 500MB.")
    nproc: int = Field(
        1, ge=1, description="Processes that share the calibration, one a GPU, through torchrun."
    )

    @field_validator("ignore")
    @classmethod
    def _patterns_compile(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if each.startswith("re:"):
                name_pattern(each[3:])
        return value

    @field_validator("group_size")
    @classmethod
    def _group_is_possible(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value != -1 and value < 8:
            raise ValueError("a group has at least 8 columns; -1 takes whole rows")
        return value

    @field_validator("max_shard_size")
    @classmethod
    def _size_is_readable(cls, value: str) -> str:
        if not re.fullmatch(r"\d+\s*([KMGT]i?)?B", value, re.IGNORECASE):
            raise ValueError(f"{value!r} is no size, such as 5GB or 500MB")
        return value
