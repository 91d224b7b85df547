"""What a quantization is told: names of number formats and methods, and settings by layer name.

A configuration maps name patterns (as in shells) to settings. A layer takes the first pattern that
fits it, in the order of the dictionary; those that none fits take ``"default"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic import ValidationError as PydanticError

from qwodel.algorithms.quant_types import FP8_E4M3, FP8_E5M2, INT4, INT6, INT8, INT16, QuantType
from qwodel.exceptions import ConfigurationError, did_you_mean
from qwodel.modeling.patterns import SegPattern
from qwodel.modules.input_rounding import InputFormat

__all__ = [
    "Calibrate",
    "CalibrationSettings",
    "Configuration",
    "DType",
    "LayerSettings",
    "Optimum",
    "OptimumSettings",
    "Polarity",
    "default_quantize_config",
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


default_quantize_config: dict[str, Any] = {
    "default": {
        "enable": True,
        "seglinear": True,
        "search_patterns": SegPattern.all(),
        "real_quant": False,
        "opt": {"type": Optimum.SMOOTH, "alpha": 0.5},
        "calib": {"type": Calibrate.AMAX},
        "input_quant": {"type": DType.INT8, "axis": None},
        "weight_quant": {"type": DType.INT8, "axis": None},
    }
}
"""What :func:`~qwodel.segquant.quantize` does unless told otherwise: W8A8 with a scale a tensor, smoothed."""

_INTERNAL = {
    "dummy": "set type FP16 or BF16 where inputs or weights are not to be quantized",
    "weight_only": "set input_quant.type to FP16 or BF16",
}


class Configuration:
    """Settings by name pattern.

    Args:
        given: pattern → settings, nested dictionaries; :data:`default_quantize_config` where ``None``.
            What a pattern leaves out, it takes from ``"default"``, and that from the defaults.

    Raises:
        ConfigurationError: an unknown key (named with its path), or a value that cannot be.
    """

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        given = default_quantize_config if given is None else given
        if not isinstance(given, Mapping):
            raise ConfigurationError(f"a configuration is a dictionary, not {type(given).__name__}")
        base = given.get("default", {})
        self._patterns: list[tuple[str, LayerSettings]] = []
        self.default = _parse("default", base)
        for pattern, settings in given.items():
            if pattern == "default":
                continue
            if isinstance(settings, Mapping) and "search_patterns" in settings:
                raise ConfigurationError(
                    f"search_patterns of {pattern!r}: patterns are searched once in a model",
                    hint="set it in 'default'; seglinear False leaves single layers whole",
                )
            self._patterns.append((pattern, _parse(pattern, _merged(base, settings))))

    def of(self, name: str) -> LayerSettings:
        """The settings of the layer with this name."""
        for pattern, settings in self._patterns:
            if fnmatchcase(name, pattern):
                return settings
        return self.default

    def all(self) -> list[LayerSettings]:
        """Every settings object in it."""
        return [self.default, *(settings for _, settings in self._patterns)]


def _merged(base: Any, given: Any) -> Any:
    if not (isinstance(base, Mapping) and isinstance(given, Mapping)):
        return given
    merged: dict[str, Any] = dict(deepcopy(base))
    for key, value in given.items():
        # The keys of one method do not go with another method.
        other = key in ("opt", "calib") and isinstance(value, Mapping) and value.get("type") is not None
        merged[key] = value if other or key not in merged else _merged(merged[key], value)
    return merged


def _parse(pattern: str, given: Any) -> LayerSettings:
    try:
        return LayerSettings.model_validate(given)
    except PydanticError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        where = ".".join([pattern, *path])
        if first["type"] == "extra_forbidden":
            known = _keys(path[:-1])
            hint = _INTERNAL.get(path[-1]) or did_you_mean(path[-1], known) or f"keys: {', '.join(known)}"
            raise ConfigurationError(f"there is no setting {where!r}", hint=hint) from None
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigurationError(f"setting {where!r}: {message}", hint=_choices(path)) from None


def _keys(path: list[str]) -> list[str]:
    model: Any = LayerSettings
    for part in path:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def _choices(path: list[str]) -> str | None:
    if path[-1:] != ["type"]:
        return None
    kinds = {"opt": Optimum, "calib": Calibrate}
    kind: Any = kinds.get(path[0], DType)
    return f"one of {', '.join(each.value for each in kind)}"
