"""Deciding from a key's name whether its layer is quantized, kept or removed.

A pattern matches words of a key, not accidental substrings: a norm is a layer
*named* norm (``norm1``, ``input_layernorm``), not the linear inside
``norm_out.linear``; ``shared`` is T5's embedding, not a shared expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from qwodel.checkpoint.families.filter_registry import (
    AVOID_KEY_NAMES,
    DISTILL_LAYER_KEYNAMES_LARGE,
    DISTILL_LAYER_KEYNAMES_SMALL,
    HUNYUAN_AVOID_KEY_NAMES,
    MODEL_FILTERS,
    NERF_LAYER_KEYNAMES_LARGE,
    NERF_LAYER_KEYNAMES_SMALL,
    QWEN_AVOID_KEY_NAMES,
    QWEN_LAYER_KEYNAMES,
    RADIANCE_LAYER_KEYNAMES,
    SAFE_KEY_NAMES,
    T5XXL_REMOVE_KEY_NAMES,
    WAN_LAYER_KEYNAMES,
    ZIMAGE_AVOID_KEY_NAMES,
    ZIMAGE_LAYER_KEYNAMES,
    ModelFilter,
)
from qwodel.exceptions import ConfigurationError, did_you_mean

__all__ = [
    "AVOID_KEY_NAMES",
    "DISTILL_LAYER_KEYNAMES_LARGE",
    "DISTILL_LAYER_KEYNAMES_SMALL",
    "HUNYUAN_AVOID_KEY_NAMES",
    "MODEL_FILTERS",
    "NERF_LAYER_KEYNAMES_LARGE",
    "NERF_LAYER_KEYNAMES_SMALL",
    "QWEN_AVOID_KEY_NAMES",
    "QWEN_LAYER_KEYNAMES",
    "RADIANCE_LAYER_KEYNAMES",
    "SAFE_KEY_NAMES",
    "T5XXL_REMOVE_KEY_NAMES",
    "WAN_LAYER_KEYNAMES",
    "ZIMAGE_AVOID_KEY_NAMES",
    "ZIMAGE_LAYER_KEYNAMES",
    "FilterVerdict",
    "ModelFilter",
    "filter_verdict",
    "matches",
    "should_process_layer",
    "validate_filters",
]

# A norm layer's own name: what precedes the parameter ("weight", "bias") or ends the key.
_NORM = re.compile(r"(?:^|\.)[^.]*norm\d*(?:_[qk])?(?:\.(?:weight|bias|scale|gamma|beta))?$", re.IGNORECASE)
_SHARED = re.compile(r"(?:^|\.)shared(?:\.|$)")


@dataclass(frozen=True, slots=True)
class FilterVerdict:
    """What the filters say of one key, and which pattern of which filter said it."""

    action: Literal["process", "exclude", "highprec", "remove"]
    reason: str


@cache
def _pattern(pattern: str) -> re.Pattern[str]:
    if pattern == "norm":
        return _NORM
    if pattern == "shared":
        return _SHARED
    body = re.escape(pattern.strip(".")).replace(r"\*", "[^.]*")
    start = "" if pattern.startswith(("_", "*")) else r"(?:^|[._])"
    if pattern.endswith("."):
        end = r"(?=\.|$)"
    else:
        end = r"(?=[._]|$)" if pattern[-1].isdigit() else r"\d*(?=[._]|$)"
    return re.compile(start + body + end, re.IGNORECASE)


def matches(pattern: str, key: str) -> bool:
    """Return whether registry ``pattern`` matches words of ``key`` (see :mod:`.filter_registry`)."""
    return _pattern(pattern).search(key) is not None


def validate_filters(flags: Mapping[str, bool]) -> tuple[str, ...]:
    """Return the names switched on in ``flags``, in registry order.

    Raises:
        ConfigurationError: a name is not in :data:`MODEL_FILTERS`.
    """
    for name in flags:
        if name not in MODEL_FILTERS:
            raise ConfigurationError(
                f"no model filter is named {name!r}",
                hint=did_you_mean(name, MODEL_FILTERS) or f"known: {', '.join(MODEL_FILTERS)}",
            )
    return tuple(name for name in MODEL_FILTERS if flags.get(name))


def filter_verdict(key: str, filters: Iterable[str] = (), *, safe: bool = True) -> FilterVerdict:
    """Judge ``key`` by the named filters and, with ``safe``, by the default every model gets."""
    names = tuple(filters)
    for name in names:
        if hit := _first(MODEL_FILTERS[name].remove, key):
            return FilterVerdict("remove", f"{name}: {hit!r} is not used")
    for name in names:
        if hit := _first(MODEL_FILTERS[name].exclude, key):
            return FilterVerdict("exclude", f"{name}: keeps {hit!r}")
        if hit := _first(MODEL_FILTERS[name].highprec, key):
            return FilterVerdict("highprec", f"{name}: keeps {hit!r} in high precision")
    if safe and (hit := _first(SAFE_KEY_NAMES, key)):
        return FilterVerdict("exclude", f"safe default: keeps {hit!r}")
    return FilterVerdict("process", "no filter keeps it")


def should_process_layer(
    key: str,
    t5xxl: bool = False,
    keep_distillation_large: bool = False,
    keep_distillation_small: bool = False,
    keep_nerf_large: bool = False,
    keep_nerf_small: bool = False,
    radiance: bool = False,
    wan: bool = False,
    qwen: bool = False,
    hunyuan: bool = False,
    zimage_l: bool = False,
    zimage_s: bool = False,
) -> tuple[bool, bool, str]:
    """Decide whether the weight named ``key`` is quantized.

    The flags switch on the filters of :data:`MODEL_FILTERS` (``zimage_l`` is
    ``zimage_refiner``, which keeps more; ``zimage_s`` is ``zimage``). Norms,
    biases, embeddings and heads are kept whatever the flags.

    Returns:
        ``(process, create_scale, reason)``. ``create_scale`` is also true for
        layers a family keeps in high precision: a reader that expects a scale
        on every linear layer of such a model may be given one of 1.0.
    """
    flags = {
        "t5xxl": t5xxl,
        "distillation_large": keep_distillation_large,
        "distillation_small": keep_distillation_small,
        "nerf_large": keep_nerf_large,
        "nerf_small": keep_nerf_small,
        "radiance": radiance,
        "wan": wan,
        "qwen": qwen,
        "hunyuan": hunyuan,
        "zimage_refiner": zimage_l,
        "zimage": zimage_s,
    }
    if not key.endswith(".weight"):
        return False, False, "not a weight"
    verdict = filter_verdict(key, validate_filters(flags))
    process = verdict.action == "process"
    return process, process or verdict.action == "highprec", verdict.reason


def _first(patterns: Iterable[str], key: str) -> str | None:
    return next((pattern for pattern in patterns if matches(pattern, key)), None)
