"""What the user wants of a conversion: one frozen value from which every plan follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwodel.checkpoint.families.layer_filters import validate_filters
from qwodel.checkpoint.formats.codec import Codec
from qwodel.checkpoint.lora.merge import LoraSource
from qwodel.checkpoint.plan.layer_config import LayerConfig
from qwodel.checkpoint.rounding.methods import Rounding
from qwodel.exceptions import ConfigurationError
from qwodel.name_patterns import name_pattern

__all__ = ["DEFAULT_SHARD_SIZE", "LayerOverride", "Recipe"]

DEFAULT_SHARD_SIZE = 5_000_000_000
"""Tensor bytes of a shard."""


@dataclass(frozen=True, slots=True)
class LayerOverride:
    """Layers whose name matches ``pattern`` get a format of their own, whatever the filters say."""

    pattern: str
    format: Codec
    rounding: Rounding | None = None
    skip_inefficient: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a checkpoint is converted.

    Attributes:
        format: what eligible weights become.
        rounding: how their codes are chosen; ``None`` takes ``default_rounding`` of each format.
        filters: names in ``MODEL_FILTERS``; ``None`` detects the family from the keys.
        custom_layers: layers with a format of their own.
        exclude_layers: regular expression; matching tensors stay as they are.
        fallback: what layers become that a model's filters, or their shape, keep out of
            ``format``; ``None`` keeps them as they are.
        fallback_rounding: how the codes of fallback layers are chosen.
        skip_inefficient_layers: leave out layers with a side below the block size, or not
            a multiple of it (128 for formats without blocks).
        layer_config: rules by layer name; they win over filters.
        layer_config_fullmatch: its patterns must match whole names.
        nonfinite: a weight with NaN or Inf is an ``"error"``, or is kept as it is
            (``"keep"``, which reads every candidate once before planning).
        loras: merged in this order.
        dampen_loras: the k-th LoRA (from 0) counts 0.9^k.
        allow_unmatched_loras: LoRA layers that fit no tensor are skipped, not an error.
        max_shard_size: tensor bytes of an output shard, for layouts that shard.
    """

    format: Codec
    rounding: Rounding | None = None
    filters: tuple[str, ...] | None = None
    custom_layers: LayerOverride | None = None
    exclude_layers: str | None = None
    fallback: Codec | None = None
    fallback_rounding: Rounding | None = None
    skip_inefficient_layers: bool = False
    layer_config: LayerConfig | None = None
    layer_config_fullmatch: bool = False
    nonfinite: Literal["error", "keep"] = "error"
    loras: tuple[LoraSource, ...] = ()
    dampen_loras: bool = True
    allow_unmatched_loras: bool = False
    max_shard_size: int = DEFAULT_SHARD_SIZE

    def __post_init__(self) -> None:
        if self.filters is not None:
            validate_filters(dict.fromkeys(self.filters, True))
        _check_regex("exclude_layers", self.exclude_layers)
        if self.custom_layers:
            _check_regex("custom_layers", self.custom_layers.pattern)
        if self.nonfinite not in ("error", "keep"):
            raise ConfigurationError(f"nonfinite is 'error' or 'keep', not {self.nonfinite!r}")
        if self.max_shard_size < 1:
            raise ConfigurationError(f"max_shard_size is a number of bytes, not {self.max_shard_size}")


def _check_regex(option: str, pattern: str | None) -> None:
    if pattern is not None:
        name_pattern(pattern, option)
