"""Finding the weight that each layer of a LoRA file is for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from qwodel.checkpoint.lora.keys import LoraFile, LoraLayer
from qwodel.exceptions import ValidationError

__all__ = ["match_layers"]

_BASE_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "text_encoder.",
                  "text_encoder_2.", "model.", "cond_stage_model.transformer.")  # fmt: skip
_LORA_PREFIXES = ("base_model.model.", "lora_unet_", "lora_te1_", "lora_te2_", "lora_te_", "lora_transformer_",
                  "lycoris_", *_BASE_PREFIXES)  # fmt: skip


def match_layers(
    lora: LoraFile, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, LoraLayer], list[str]]:
    """Pair the layers of ``lora`` with weights.

    Args:
        shapes: shape of every tensor of the base checkpoint, by name, in file order.

    Returns:
        Weight name → layer, and the names of layers that fit none.

    Raises:
        ValidationError: a layer fits two weights, or one of the wrong shape.
    """
    if lora.numbered:
        return _match_numbers(lora, shapes)
    index: dict[str, set[str]] = defaultdict(set)
    for name in shapes:
        for alias in _aliases(name.removesuffix(".weight"), _BASE_PREFIXES):
            index[alias.replace(".", "_")].add(name)
    matched: dict[str, LoraLayer] = {}
    unmatched = []
    for layer in lora.layers:
        target = _target(lora, layer, index)
        if target is None:
            unmatched.append(layer.name)
            continue
        _check_shape(lora, layer, target, shapes[target])
        matched[target] = layer
    return matched, unmatched


def _target(lora: LoraFile, layer: LoraLayer, index: Mapping[str, set[str]]) -> str | None:
    # The whole name first: a prefix may be part of the base's own names.
    for alias in _aliases(layer.name, _LORA_PREFIXES):
        found = index.get(alias.replace(".", "_"), set())
        if len(found) > 1:
            raise ValidationError(f"{lora.path}: {layer.name!r} fits {', '.join(sorted(found))}")
        if found:
            return next(iter(found))
    return None


def _aliases(name: str, prefixes: Iterable[str]) -> list[str]:
    """``name``, then ``name`` without one or more known prefixes, longest first."""
    aliases = [name]
    for prefix in prefixes:
        shorter = aliases[-1].removeprefix(prefix)
        if shorter != aliases[-1]:
            aliases.append(shorter)
    return aliases


def _check_shape(lora: LoraFile, layer: LoraLayer, target: str, shape: tuple[int, ...]) -> None:
    out, into = (1, 0) if lora.transposed else (0, 1)
    fits = len(shape) >= 2 and shape[out] == layer.up_shape[0] and shape[into] == layer.down_shape[1]
    fits = fits and _kernel(shape) in (_kernel(layer.down_shape), ())
    fits = fits or (len(shape) > 2 and _kernel(shape) == (1,) * (len(shape) - 2) and shape[:2] == (
        layer.up_shape[0], layer.down_shape[1]))  # fmt: skip
    if not fits:
        raise ValidationError(
            f"{lora.path}: {layer.name!r} ({list(layer.up_shape)}·{list(layer.down_shape)}) "
            f"does not fit {target!r} {list(shape)}",
            hint="this LoRA was made for another base model",
        )


def _kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    kernel = tuple(shape[2:])
    return () if all(n == 1 for n in kernel) else kernel


# cloneofsimo numbers the linear layers inside attention and GEGLU modules in module order. Which
# order that is depends on the diffusers release: attn1, ff, attn2 at first, attn1, attn2, ff later.
_BLOCK_ORDERS = (
    ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj",
     "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
     "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj"),
)  # fmt: skip
_CLIP_ORDER = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj")
_MAX_DIGITS = 9
_SECTIONS = ("down_blocks", "up_blocks", "mid_block")


def _match_numbers(
    lora: LoraFile, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, LoraLayer], list[str]]:
    groups: dict[str, list[LoraLayer]] = defaultdict(list)
    for layer in lora.layers:
        groups[layer.name.partition(":")[0]].append(layer)
    matched: dict[str, LoraLayer] = {}
    unmatched: list[str] = []
    for group, layers in groups.items():
        layers.sort(key=lambda each: _number(lora, each.name))
        for targets in _orders(group, shapes):
            if len(targets) == len(layers) and all(
                shapes[target][:2] == (layer.up_shape[0], layer.down_shape[1])
                for target, layer in zip(targets, layers, strict=True)
            ):
                matched |= dict(zip(targets, layers, strict=True))
                break
        else:
            unmatched += [layer.name for layer in layers]
    return matched, unmatched


def _number(lora: LoraFile, name: str) -> int:
    digits = name.rpartition(":")[2]
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= _MAX_DIGITS):
        raise ValidationError(f"{lora.path}: {name!r} has no number, and other layers are numbered")
    return int(digits)


def _orders(group: str, shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """The ways this base may have been numbered: lists of weight names."""
    if group.startswith("text_encoder"):
        orders: tuple[tuple[str, ...], ...] = (_CLIP_ORDER,)
        parts = r"^(.*text_model\.encoder\.layers\.\d+)\."
    else:
        parts, orders = r"^(.*transformer_blocks\.\d+)\.", _BLOCK_ORDERS
    blocks = {found[1] for name in shapes if (found := re.match(parts, name))}
    ordered = sorted(blocks, key=_module_order)
    candidates = [[f"{block}.{part}.weight" for block in ordered for part in order] for order in orders]
    return [names for names in candidates if all(name in shapes for name in names)]


def _module_order(block: str) -> tuple[int, list[int]]:
    """diffusers registers down, up, then mid blocks; numbers count as numbers."""
    section = next((index for index, name in enumerate(_SECTIONS) if name in block), len(_SECTIONS))
    return section, [int(number) for number in re.findall(r"\d+", block)]
