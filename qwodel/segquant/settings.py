"""What a quantization is told about one layer: number formats, methods, and the keys of each."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from qwodel.algorithms.quant_types import FP8_E4M3, FP8_E5M2, INT4, INT6, INT8, INT16, QuantType
from qwodel.modeling.patterns import SegPattern
from qwodel.modules.input_rounding import InputFormat

__all__ = [
    "AlphaSearch",
    "Calibrate",
    "CalibrationSettings",
    "DType",
    "InputSettings",
    "LayerSettings",
    "Optimum",
    "OptimumSettings",
    "Polarity",
    "WeightSettings",
]


class DType(StrEnum):
    """Number formats."""

    INT4 = "int4"
    INT6 = "int6"
    INT8 = "int8"
    INT16 = "int16"
    FP8E4M3 = "fpe4m3"
    FP8E5M2 = "fpe5m2"
    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def quant_type(self) -> QuantType | None:
        """The type of its codes; ``None`` of 16-bit floating point, which has none."""
        return _QUANT_TYPES.get(self)

    @property
    def float_dtype(self) -> torch.dtype | None:
        """What 16-bit floating point is cast to; ``None`` of all others."""
        return _FLOATS.get(self)


_QUANT_TYPES = {
    DType.INT4: INT4,
    DType.INT6: INT6,
    DType.INT8: INT8,
    DType.INT16: INT16,
    DType.FP8E4M3: FP8_E4M3,
    DType.FP8E5M2: FP8_E5M2,
}
_FLOATS = {DType.FP16: torch.float16, DType.BF16: torch.bfloat16}


class Optimum(StrEnum):
    """What is done about outliers before rounding."""

    DEFAULT = "default"
    SMOOTH = "smooth"
    SVD = "svd"


class Calibrate(StrEnum):
    """How weights are rounded."""

    AMAX = "amax"
    GPTQ = "gptq"


class Polarity(StrEnum):
    """How codes treat values above and below zero."""

    ONE = "one scale"
    TWO = "dual"
    ZERO = "zero point"


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AlphaSearch(_Settings):
    """Values of α to try: ``min``, ``min + step`` …, and ``max`` itself."""

    enable: bool = True
    min: float = Field(0.0, ge=0, le=1)
    max: float = Field(1.0, ge=0, le=1)
    step: float = Field(0.1, gt=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, greater than max, {self.max}")
        return self

    def values(self) -> list[float]:
        """The values to try, rising, ``max`` last."""
        count = int((self.max - self.min) / self.step + 1e-9)
        inner = [round(self.min + self.step * index, 10) for index in range(count + 1)]
        return inner if inner[-1] >= self.max - 1e-9 else [*inner, self.max]


class OptimumSettings(_Settings):
    """``opt``: what is done about outliers."""

    type: Optimum = Optimum.SMOOTH
    alpha: float = Field(0.5, ge=0, le=1)
    search_alpha_config: AlphaSearch = AlphaSearch(enable=False)
    low_rank: int = Field(32, ge=1)
    precision: Literal["float32", "float64"] = "float64"
    iterations: int = Field(4, ge=0)
    keep_best: bool = True
    verbose: bool = False

    def alphas(self) -> list[float]:
        """What is tried of a smoothed layer."""
        return self.search_alpha_config.values() if self.search_alpha_config.enable else [self.alpha]


class CalibrationSettings(_Settings):
    """``calib``: how weights are rounded and scales are found."""

    type: Calibrate = Calibrate.AMAX
    search_range: bool = False
    blocksize: int = Field(128, ge=1)
    percdamp: float = Field(0.01, gt=0, le=1)
    groupsize: int = Field(-1, ge=-1)
    actorder: bool = False
    static_groups: bool | None = None
    cpu_storage: bool = False
    verbose: bool = False

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.groupsize == 0:
            raise ValueError("groupsize is -1 (none) or a number of columns")
        if self.static_groups is False and self.groupsize > 0:
            raise ValueError(
                "scales of groups are always settled before rounding: static_groups cannot be off"
            )
        given = self.model_fields_set - {"type", "search_range", "verbose"}
        if self.type is Calibrate.AMAX and given:
            raise ValueError(f"{', '.join(sorted(given))} belong to GPTQ, and type is AMAX")
        return self


class _Rounding(_Settings):
    type: DType = DType.INT8
    axis: Literal[-1, 1] | None = None
    dynamic: bool = False
    symmetric: bool | None = None

    @property
    def integers(self) -> bool:
        """Whether codes are integers."""
        kind = self.type.quant_type
        return kind is not None and not kind.is_float

    @model_validator(mode="after")
    def _with_zero_points(self) -> Self:
        if self.symmetric is False and not self.integers:
            raise ValueError(f"symmetric is about integers; {self.type} has no zero point")
        return self


class InputSettings(_Rounding):
    """``input_quant``: what a layer reads."""

    dual_scale: bool | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.axis == 1:
            raise ValueError(
                "axis 1 of inputs would be a scale for each channel, which no product can take out; "
                "opt SMOOTH with alpha 1 has the same effect"
            )
        if self.axis == -1 and not self.dynamic and self.type.quant_type is not None:
            raise ValueError("axis -1 is a scale for each token, and tokens differ: set dynamic")
        if self.dual_scale and (self.symmetric is False or not self.integers):
            raise ValueError("dual_scale is for symmetric integers")
        return self

    def polarities(self, *, asymmetric: bool) -> list[Polarity]:
        """What to try: one scale, two of them, or a zero point.

        Args:
            asymmetric: an activation function feeds the layer, and one side reaches much further.
        """
        if self.symmetric is False:
            return [Polarity.ZERO]
        if self.dual_scale:
            return [Polarity.TWO]
        if not asymmetric or not self.integers or self.dual_scale is False:
            return [Polarity.ONE]
        return [Polarity.ONE, Polarity.TWO] if self.symmetric else list(Polarity)

    def form(self, polarity: Polarity) -> InputFormat:
        """What inputs are rounded to."""
        return InputFormat(
            self.type.quant_type,
            self.type.float_dtype,
            per_token=self.axis == -1 and self.type.quant_type is not None,
            dynamic=self.dynamic,
            symmetric=polarity is not Polarity.ZERO,
            dual=polarity is Polarity.TWO,
        )


class WeightSettings(_Rounding):
    """``weight_quant``: a layer's weight."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.dynamic:
            raise ValueError("weights do not change: dynamic is for inputs")
        return self


class LayerSettings(_Settings):
    """Everything about one layer."""

    enable: bool = True
    seglinear: bool = True
    search_patterns: tuple[SegPattern, ...] = tuple(SegPattern.all())
    real_quant: bool = False
    conv: bool = False
    opt: OptimumSettings = OptimumSettings()
    calib: CalibrationSettings = CalibrationSettings()
    input_quant: InputSettings = InputSettings()
    weight_quant: WeightSettings = WeightSettings()

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.calib.type is Calibrate.GPTQ:
            if self.weight_quant.symmetric is False:
                raise ValueError("GPTQ rounds to symmetric grids: weight_quant.symmetric cannot be off")
            if self.weight_quant.type.quant_type is None:
                raise ValueError(f"GPTQ has nothing to round where weights are {self.weight_quant.type}")
        if self.weight_quant.symmetric is False and self.calib.search_range:
            raise ValueError("search_range looks for symmetric scales: weight_quant.symmetric cannot be off")
        return self
