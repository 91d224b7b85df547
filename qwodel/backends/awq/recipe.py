"""What a run quantizes and how: targets, group size, and llm-compressor's modifiers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qwodel.backends.awq.options import AWQOptions
from qwodel.exceptions import ConfigurationError, ValidationError
from qwodel.modeling.wiring import Pair, ProducerKind, find_pairs
from qwodel.name_patterns import name_pattern

__all__ = [
    "KERNEL_GROUPS",
    "choose_group_size",
    "choose_symmetry",
    "is_ignored",
    "make_modifiers",
    "mappings",
    "targets",
]

KERNEL_GROUPS = (128, 64, 32)
"""Group sizes that vLLM's 4-bit kernels take, beside whole rows (-1)."""
_OTHER_GROUPS = (16, 8)

_DEFAULT_IGNORE = (
    "lm_head",
    "embed_out",
    r"re:(.*\.)?output_layer",
    r"re:.*\.(gate|router|shared_expert_gate)",
    r"re:.*\.router\..*",
    r"re:(.*\.)?(vision_tower|vision_model|visual|vision_encoder|audio_tower|audio_encoder|audio_model)\..*",
    r"re:(.*\.)?(multi_modal_projector|mm_projector|embed_vision|embed_audio|connector)(\..*)?",
    r"re:(.*\.)?mtp(\..*)?",
    r"re:(.*\.)?(nextn|eh_proj)(\..*)?",
)
_log = logging.getLogger("AWQQuantizer")


def is_ignored(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module is named, or matched from its start to its end by a ``re:`` pattern."""
    return any(
        name_pattern(pattern[3:]).fullmatch(name) if pattern.startswith("re:") else pattern == name
        for pattern in patterns
    )


def targets(model: Any, options: AWQOptions) -> dict[str, nn.Linear]:
    """Return the linear layers a run quantizes, by name.

    Raises:
        ValidationError: there are none.
        ConfigurationError: one of them is the output layer, which shares its weight with the embedding.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    patterns = (*(_DEFAULT_IGNORE if options.default_ignore else ()), *options.ignore)
    for pattern in options.ignore:
        if not any(is_ignored(name, [pattern]) for name, _ in model.named_modules()):
            _log.warning("ignore: no module of the model matches %r", pattern)
    head = model.get_output_embeddings()
    found = {
        name: module
        for name, module in linear.items()
        if not is_ignored(name, patterns) and not (options.default_ignore and module is head)
    }
    if not found:
        other = sorted({type(each).__name__ for each in model.modules() if type(each).__name__ == "Conv1D"})
        reason = f"its matrices are {other[0]} modules, not Linear" if other else "all are ignored"
        raise ValidationError(
            f"unsupported model architecture {type(model).__name__}: no linear layer to quantize; {reason}",
            hint="4-bit weights in compressed-tensors replace torch.nn.Linear layers only",
        )
    embedding = model.get_input_embeddings()
    for name, module in found.items():
        if embedding is not None and module.weight is embedding.weight:
            raise ConfigurationError(
                f"{name} shares its weight with the embedding, which cannot be quantized with it",
                hint=f"add {name!r} to ignore",
            )
    return found


def choose_group_size(columns: Mapping[str, int], wanted: str | int) -> int:
    """Return the group size for layers with these columns; -1 stands for whole rows.

    Raises:
        ConfigurationError: ``wanted`` does not divide every layer's columns, or ``auto`` finds none.
    """
    widths = sorted(set(columns.values()))
    if wanted == "auto":
        for size in (*KERNEL_GROUPS, *_OTHER_GROUPS):
            if all(width % size == 0 for width in widths):
                _log.info("group_size %d, the largest that divides the columns %s", size, _list(widths))
                _warn_of_kernels(size)
                return size
        odd = [name for name, width in columns.items() if width % _OTHER_GROUPS[-1]]
        raise ConfigurationError(
            f"no group size divides the columns of {_names(odd)}",
            hint="pass group_size=-1 for one scale a row, or add these layers to ignore",
        )
    size = int(wanted)
    odd = [name for name, width in columns.items() if size != -1 and width % size]
    if odd:
        possible = [each for each in KERNEL_GROUPS if all(width % each == 0 for width in widths)]
        raise ConfigurationError(
            f"group_size {size} does not divide the columns ({columns[odd[0]]}) of {_names(odd)}",
            hint=f"it would divide with {', '.join(map(str, possible))}" if possible
            else "pass group_size='auto', or -1 for one scale a row",
        )  # fmt: skip
    _warn_of_kernels(size)
    return size


def choose_symmetry(model: Any, options: AWQOptions) -> bool:
    """Return whether weights go without zero points.

    With them the quality is better; experts do without, because transformers reads no zero points
    of theirs.

    Raises:
        ConfigurationError: zero points were asked for, and the model has experts.
    """
    from llmcompressor.modeling.moe.linearize import get_linearized_moes

    experts = bool(get_linearized_moes(model))
    if options.symmetric is None:
        return experts
    if experts and not options.symmetric:
        raise ConfigurationError(
            "symmetric=False gives experts zero points, which transformers cannot read",
            hint="leave symmetric unset, or pass symmetric=True",
        )
    return options.symmetric


def make_modifiers(
    model: Any, options: AWQOptions, group_size: int, symmetric: bool, quantized: Iterable[str]
) -> list[Any]:
    """Return llm-compressor's two modifiers: the search for scales, and the quantization."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    kept = set(quantized)
    ignored = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in kept
    ]
    weights = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
        observer="memoryless_mse",  # scales of the least squared error, not of the extremes
    )
    search = AWQModifier(
        mappings=mappings(model, kept), duo_scaling=options.duo_scaling, n_grid=options.n_grid
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return [search, QuantizationModifier(ignore=ignored, config_groups={"group_0": scheme})]


def mappings(model: Any, quantized: set[str]) -> list[Any]:
    """Return AWQ mappings by exact names: llm-compressor's own, or those of the model's wiring.

    Mappings whose consumers are all left as they are stay out; llm-compressor would divide by zero.

    Raises:
        ValidationError: llm-compressor has none, and the wiring is unknown or can carry no scales.
    """
    from llmcompressor.modifiers.transform.awq import (
        AWQ_DYNAMIC_MAPPING_REGISTRY,
        AWQ_MAPPING_REGISTRY,
        AWQMapping,
    )

    architecture = type(model).__name__
    if architecture in AWQ_MAPPING_REGISTRY or architecture in AWQ_DYNAMIC_MAPPING_REGISTRY:
        return [each for each in _known_mappings(model) if quantized.intersection(each.balance_layers)]
    pairs = find_pairs(model)
    usable = [pair for pair in pairs if _awq_can_scale(model, pair, quantized)]
    norms = (ProducerKind.NORM, ProducerKind.NORM_PLUS_ONE)
    if not any(pair.kind in norms for pair in usable):
        missing = next((pair for pair in pairs if pair.kind in norms), pairs[0])
        raise ValidationError(
            f"unsupported model architecture {architecture}: AWQ cannot move scales from {missing.producer} "
            f"to {', '.join(missing.consumers)}",
            hint="quantize with another backend, such as gguf or int8",
        )
    _log.info("%d AWQ mappings of %s from its wiring", len(usable), architecture)
    return [AWQMapping(pair.producer, list(pair.consumers)) for pair in usable]


def _known_mappings(model: Any) -> Iterator[Any]:
    """Yield llm-compressor's mappings of an architecture, layer by layer."""
    from compressed_tensors.utils import match_modules_set
    from llmcompressor.modifiers.transform.awq import AWQMapping, get_layer_mappings_from_model
    from torch.utils._pytree import tree_leaves

    names = {module: name for name, module in model.named_modules()}
    for mapping in get_layer_mappings_from_model(model):
        for smooth, *balance in match_modules_set(model, (mapping.smooth_layer, *mapping.balance_layers)):
            for producer in smooth:
                yield AWQMapping(
                    names[producer],
                    [names[module] for module in tree_leaves(balance)],
                    mapping.activation_hook_target,
                )


def _awq_can_scale(model: Any, pair: Pair, quantized: set[str]) -> bool:
    """Whether llm-compressor's smoothing is exact on a pair, and worth doing."""
    from llmcompressor.modeling.offset_norm import NormCalibrationModule

    consumers = [_module(model, name) for name in pair.consumers]
    if not all(isinstance(each, nn.Module) and hasattr(each, "weight") for each in consumers):
        return False
    if not quantized.intersection(pair.consumers):
        return False
    producer = model.get_submodule(pair.producer)
    if pair.kind is ProducerKind.NORM:
        return True
    if pair.kind is ProducerKind.NORM_PLUS_ONE:
        registered: Sequence[str] = (
            NormCalibrationModule.registered_names() + NormCalibrationModule.registered_aliases()
        )
        known = {_plain(name) for name in registered}
        return _plain(type(producer).__name__) in known
    # It scales the last outputs of a fused layer, but all of its bias.
    whole = pair.outputs[0] == 0
    return pair.groups == 1 and isinstance(producer, nn.Linear) and (whole or producer.bias is None)


def _module(model: Any, name: str) -> nn.Module | torch.Tensor | None:
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf, None)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _warn_of_kernels(size: int) -> None:
    if size != -1 and size not in KERNEL_GROUPS:
        _log.warning(
            "group_size %d: transformers reads it; vLLM's kernels take %s or -1",
            size, ", ".join(map(str, KERNEL_GROUPS)),
        )  # fmt: skip


def _names(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
