"""``config.json`` of a model directory: read in one place, and of the types its readers count on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwodel.exceptions import ValidationError
from qwodel.untrusted import checked_int, kind_of, read_json_object

__all__ = ["check_config", "context_length", "read_config", "text_config"]

_OBJECTS = ("quantization_config", "text_config", "vision_config", "auto_map", "ssm_cfg")
_STRINGS = ("model_type", "_class_name")
_TEXT_PARTS = ("text_config", "llm_config", "language_config")
_CONTEXTS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
_COUNTS_PADDING = frozenset(
    ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod")
)
_LARGEST = (1 << 31) - 1
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``folder/config.json``, or an empty mapping where there is none.

    ``Infinity`` is let through: Python writes it, and Mamba's ``time_step_limit`` holds it.

    Raises:
        ValidationError: the file is not a JSON object, or an entry is of another type than its readers
            count on (see :func:`check_config`).
    """
    file = folder / "config.json"
    if kind_of(file) != "file":
        return {}
    config = read_json_object(file, constants=True)
    check_config(config, str(file))
    return config


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Check the entries that this library reads; absent ones and ``null`` are always right.

    ``architectures`` is a list of strings; ``model_type`` and ``_class_name`` are strings; sizes are
    integers; ``text_config``, ``quantization_config`` and their like are objects, and what they
    hold is checked in the same way.

    Raises:
        ValidationError: one is something else; the message names it.
    """
    for key in _OBJECTS:
        _require(config, key, dict, "an object", where)
    for key in _STRINGS:
        _require(config, key, str, "a string", where)
    _require(config, "architectures", list, "a list", where)
    if not all(isinstance(name, str) for name in config.get("architectures") or []):
        raise ValidationError(f"{where}: architectures is not a list of names")
    for key in _SIZES:
        # Denoisers have lists here, one entry a stage.
        if isinstance(config.get(key), int | float | str | dict):
            checked_int(config[key], f"{where}: {key}", low=-1, high=_LARGEST)
    if isinstance(config.get("text_config"), dict):
        check_config(config["text_config"], f"{where}: text_config")
    if config.get("quantization_config"):
        _check_quantization(config["quantization_config"], f"{where}: quantization_config")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language part of a configuration, over what the whole says."""
    for name in _TEXT_PARTS:
        if isinstance(config.get(name), dict):
            return {**config, **config[name]}
    return config


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model's positions reach, or ``None`` where its configuration does not say."""
    text = text_config(config)
    for name in _CONTEXTS:
        limit = text.get(name)
        if isinstance(limit, int) and limit > 0:
            # RoBERTa's first positions are those of padding.
            padding = text.get("pad_token_id")
            first = 1 if padding is None else int(padding)
            return limit - (first + 1 if text.get("model_type") in _COUNTS_PADDING else 0)
    return None


def _check_quantization(stated: Mapping[str, Any], where: str) -> None:
    _require(stated, "quant_method", str, "a string", where)
    _require(stated, "config_groups", dict, "an object", where)
    _check_block(stated.get("weight_block_size"), f"{where}: weight_block_size")
    for name, group in (stated.get("config_groups") or {}).items():
        place = f"{where}: config_groups.{name[:100]}"
        if not isinstance(group, dict):
            raise ValidationError(f"{place} is not an object")
        _require(group, "format", str, "a string", place)
        _require(group, "weights", dict, "an object", place)
        _check_block((group.get("weights") or {}).get("block_structure"), f"{place}: block_structure")


def _check_block(value: object, where: str) -> None:
    if value is None:
        return
    if not isinstance(value, list) or len(value) != 2:
        raise ValidationError(f"{where} is not a pair of sizes")
    for size in value:
        checked_int(size, where, low=1, high=_LARGEST)


def _require(config: Mapping[str, Any], key: str, kind: type, name: str, where: str) -> None:
    value = config.get(key)
    if value is not None and not isinstance(value, kind):
        raise ValidationError(f"{where}: {key} is not {name}, but {value!r:.100}")
