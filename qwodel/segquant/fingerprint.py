"""What a calibration set was made with, in a form that can be stored and compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from qwodel.segquant.sampling_run import modules_of

__all__ = ["describe_inputs", "describe_model", "differences"]

_SAMPLED = 256


def describe_model(model: Callable[..., Any], calib_layer: nn.Module) -> dict[str, str]:
    """Return class, weights and scheduler of a sampling model, and which layer is recorded."""
    modules = modules_of(model)
    names = [
        f"{owner}.{name}".strip(".")
        for owner, module in modules.items()
        for name, inner in module.named_modules()
        if inner is calib_layer
    ]
    digest = hashlib.sha256()
    for owner, module in (modules or {"": calib_layer}).items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor):
                digest.update(f"{owner}.{name}".encode() + _tensor_digest(tensor))
    described = {
        "model": _name(model),
        "weights": digest.hexdigest(),
        "calib_layer": names[0] if names else _name(calib_layer),
    }
    scheduler = getattr(model, "scheduler", None)
    if scheduler is not None:
        config = {key: str(value) for key, value in dict(getattr(scheduler, "config", {})).items()}
        described["scheduler"] = f"{type(scheduler).__name__} {_short(json.dumps(config, sort_keys=True))}"
    return described


def describe_inputs(inputs: Any) -> str:
    """Return a digest of nested sampling inputs: tensors by content, anything else as it is written."""
    leaves, structure = pytree.tree_flatten(inputs)
    digest = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            digest.update(_tensor_digest(leaf, whole=True))
        elif isinstance(leaf, torch.Generator):
            digest.update(str(leaf.initial_seed()).encode())
        elif isinstance(leaf, str | int | float | bool | None | torch.dtype | torch.device):
            digest.update(repr(leaf).encode())
        elif hasattr(leaf, "tobytes"):  # images and numpy arrays
            digest.update(leaf.tobytes())
        else:
            digest.update(_name(leaf).encode())
    return digest.hexdigest()


def _tensor_digest(tensor: torch.Tensor, *, whole: bool = False) -> bytes:
    """Return a digest of shape, dtype and content; of a large one, an exact sum and some elements."""
    data = tensor.detach()
    digest = hashlib.sha256(f"{tuple(data.shape)} {data.dtype}".encode())
    if data.device.type == "meta" or not data.numel():
        return digest.digest()
    raw = data.cpu().contiguous().view(-1).view(torch.uint8)
    if not whole and len(raw) > 16 * _SAMPLED:
        digest.update(str(int(raw.sum(dtype=torch.int64))).encode())
        raw = raw[torch.linspace(0, len(raw) - 1, _SAMPLED, dtype=torch.float64).long()]
    digest.update(raw.numpy().tobytes())
    return digest.digest()


def _name(thing: Any) -> str:
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return a phrase for every setting in which ``stored`` differs from ``wanted``."""
    return [
        _difference(key, stored.get(key), wanted.get(key))
        for key in dict.fromkeys([*stored, *wanted])
        if stored.get(key) != wanted.get(key)
    ]


def _difference(key: str, before: Any, after: Any) -> str:
    digests = isinstance(before, str) and isinstance(after, str) and len(before) == len(after) == 64
    return f"other {key}" if digests else f"{key} was {before!r}, is {after!r}"
