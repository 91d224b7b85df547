"""Per-layer settings from a JSON file: ``{"layer_patterns": {regex: {format, block_size, skip}}}``.

The first pattern that matches a layer's name decides, in file order; the name
is the weight's key without ``.weight``, or the whole key.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qwodel.checkpoint.formats.registry import CODECS
from qwodel.exceptions import ConfigurationError, did_you_mean
from qwodel.name_patterns import name_pattern
from qwodel.untrusted import read_json_object

__all__ = ["LayerConfig", "LayerRule", "load_layer_config"]

_ALIASES = {"int8": "int8_row", "fp8": "fp8_e4m3", "float16": "fp16", "bfloat16": "bf16"}


class LayerRule(BaseModel):
    """What one pattern asks for.

    Attributes:
        format: a storage format such as ``"int8_row"`` or ``"fp16"``; ``"int8"``
            and ``"fp8"`` mean row and tensor scales, or blocks when
            ``block_size`` is given. ``None`` keeps the run's own format.
        block_size: side of square scale blocks, in elements.
        skip: keep the layer in its source dtype.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str | None = None
    block_size: int | None = Field(default=None, gt=0)
    skip: bool = False

    @field_validator("format")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is None:
            return None
        name = value.casefold().replace("-", "_")
        if name not in CODECS and name not in _ALIASES:
            known = [*_ALIASES, *CODECS]
            raise ValueError(f"unknown format {value!r}; {did_you_mean(value, known) or f'known: {known}'}")
        return name

    @property
    def storage_name(self) -> str | None:
        """The storage format's name with aliases resolved and blocks taken into account."""
        if self.format is None:
            return None
        if self.block_size and self.format in ("int8", "fp8"):
            return {"int8": "int8_block", "fp8": "fp8_e4m3_block"}[self.format]
        return _ALIASES.get(self.format, self.format)


class LayerConfig(BaseModel):
    """A whole file of rules."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer_patterns: dict[str, LayerRule]

    @field_validator("layer_patterns")
    @classmethod
    def _compiles(cls, value: dict[str, LayerRule]) -> dict[str, LayerRule]:
        for pattern in value:
            name_pattern(pattern, "layer_patterns")
        return value

    @classmethod
    def from_mapping(
        cls, config: Mapping[str, Any] | LayerConfig, source: str = "layer_config"
    ) -> LayerConfig:
        """Validate a mapping in the file's schema.

        Raises:
            ConfigurationError: names every offending key and what is wrong with it.
        """
        if isinstance(config, LayerConfig):
            return config
        try:
            return cls.model_validate(dict(config))
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
                for problem in error.errors()
            )
            raise ConfigurationError(
                f"{source}: {problems}",
                hint='the schema is {"layer_patterns": {"<regex>": {"format": …, "block_size": …, "skip": …}}}',
            ) from error

    def rule_for(self, key: str, *, fullmatch: bool = False) -> tuple[str, LayerRule] | None:
        """Return the first ``(pattern, rule)`` that matches ``key``.

        Args:
            key: a tensor's name.
            fullmatch: the pattern must match the whole name, with or without ``.weight``.
        """
        layer = key.removesuffix(".weight")
        for pattern, rule in self.layer_patterns.items():
            expression = name_pattern(pattern)
            if fullmatch:
                found = expression.fullmatch(layer) or expression.fullmatch(key)
            else:
                found = expression.search(key)
            if found:
                return pattern, rule
        return None


def load_layer_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and validate a layer configuration file; return it in the file's own schema.

    Raises:
        ConfigurationError: the file cannot be read, is not JSON, or has an
            unknown key or a bad value, which the message names.
    """
    path = Path(path)
    document = read_json_object(path, error=ConfigurationError)
    return LayerConfig.from_mapping(document, str(path)).model_dump(exclude_unset=True)
