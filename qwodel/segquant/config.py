"""Settings by layer name.

A configuration maps name patterns (as in shells) to settings. A layer takes the first pattern that
fits it, in the order of the dictionary; those that none fits take ``"default"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from fnmatch import fnmatchcase
from typing import Any

from pydantic import ValidationError as PydanticError

from qwodel.exceptions import ConfigurationError, did_you_mean
from qwodel.modeling.patterns import SegPattern
from qwodel.segquant.settings import Calibrate, DType, LayerSettings, Optimum

__all__ = ["Configuration", "default_quantize_config"]

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
