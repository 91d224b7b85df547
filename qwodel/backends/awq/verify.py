"""The saved directory read back: by transformers, by vLLM's rules, and tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwodel.backends.awq.bridge import bridged
from qwodel.backends.awq.loading import load_model
from qwodel.exceptions import IntegrityError
from qwodel.model_config import read_config
from qwodel.process_state import AWQ_RUN, MODEL_BUILDING
from qwodel.safetensors_files import TensorEntry, read_header
from qwodel.source import ModelSource

__all__ = [
    "FUSED",
    "FusedLayers",
    "LogitsAgreement",
    "TensorFates",
    "account",
    "check_fused_layers",
    "check_logits",
    "tensor_entries",
]

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("w1", "w3"),
)
"""Layers that vLLM loads as one: they must be stored alike."""
_PACKED = "weight_packed"
_RELATIVE_BOUND = {"F32": 1e-3}
_HALF_BOUND = 3e-2


@dataclass(frozen=True, slots=True)
class LogitsAgreement:
    """How logits agree with those that were expected.

    Attributes:
        relative: ‖found − expected‖ / ‖expected‖.
        bound: the most that arithmetic explains.
        top1: share of positions with the same first choice.
    """

    relative: float
    bound: float
    top1: float


@dataclass(frozen=True, slots=True)
class FusedLayers:
    """Numbers of groups that vLLM loads as one, and of packed layers."""

    groups: int
    layers: int


@dataclass(frozen=True, slots=True)
class TensorFates:
    """Names of the source's tensors by what became of them."""

    quantized: list[str]
    kept: list[str]
    dropped: list[str]

    def counts(self) -> dict[str, int]:
        """How many there are of each."""
        return {"quantized": len(self.quantized), "kept": len(self.kept), "dropped": len(self.dropped)}


def tensor_entries(folder: Path) -> dict[str, TensorEntry]:
    """Return name → header entry of every tensor in a directory's safetensors files."""
    found: dict[str, TensorEntry] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= dict(read_header(file).tensors)
    return found


def check_logits(folder: Path, architecture: str, tokens: Any, expected: Any, dtype: str) -> LogitsAgreement:
    """Load the directory with transformers and compare its logits with the fake-quantized model's.

    Raises:
        IntegrityError: they differ by more than the arithmetic of ``dtype`` explains.
    """
    import torch

    with AWQ_RUN, MODEL_BUILDING, bridged():
        model = load_model(folder, architecture)
        with torch.no_grad():
            found = model(input_ids=torch.as_tensor(tokens), use_cache=False).logits.float().cpu()
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    bound = _RELATIVE_BOUND.get(dtype, _HALF_BOUND)
    if not math.isfinite(error) or error > bound:
        raise IntegrityError(
            f"read back, the model's logits differ by {error:.2g} from those of the model that was saved "
            f"(bound {bound:g})"
        )
    same = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    return LogitsAgreement(error, bound, same)


def check_fused_layers(folder: Path, quantized: Iterable[str]) -> FusedLayers:
    """Check the directory by what vLLM asks of a compressed-tensors checkpoint.

    The scheme is ``pack-quantized``; every quantized layer has packed weights, scales and shape, and
    zero points if and only if the scheme is asymmetric; layers that vLLM fuses are all stored packed
    or all plain, with scales of the same groups.

    Raises:
        IntegrityError: one of these does not hold.
    """
    config = read_config(folder).get("quantization_config") or {}
    if config.get("quant_method") != "compressed-tensors" or config.get("format") != "pack-quantized":
        raise IntegrityError(f"config.json does not describe packed weights: {json.dumps(config)[:200]}")
    weights = next(iter(config["config_groups"].values()))["weights"]
    tensors = tensor_entries(folder)
    packed = {name.rpartition(".")[0]: tensors[name] for name in tensors if name.endswith(f".{_PACKED}")}
    expected = {_PACKED, "weight_scale", "weight_shape"} | (
        set() if weights["symmetric"] else {"weight_zero_point"}
    )
    for layer in packed:
        parts = {leaf for leaf in (*expected, "weight_zero_point") if f"{layer}.{leaf}" in tensors}
        if parts != expected:
            raise IntegrityError(
                f"{layer} is stored with {sorted(parts)}, and {sorted(expected)} belong to it"
            )
    missing = _unstored(quantized, packed)
    if missing:
        raise IntegrityError(f"{len(missing)} layers were quantized and not stored so: {missing[0]} …")
    return FusedLayers(_check_groups(tensors, packed), len(packed))


def _unstored(quantized: Iterable[str], packed: Mapping[str, Any]) -> list[str]:
    # Checkpoints may name a model's parts otherwise than its classes do: compared by number then.
    names = list(quantized)
    missing = [name for name in names if name not in packed]
    return [] if len(packed) == len(names) else missing


def _check_groups(tensors: Mapping[str, Any], packed: Mapping[str, Any]) -> int:
    count = 0
    parents = {name.rpartition(".")[0].rpartition(".")[0] for name in tensors}
    for parent in sorted(parents):
        for group in FUSED:
            members = [f"{parent}.{name}" for name in group]
            present = [name for name in members if name in packed or f"{name}.weight" in tensors]
            if len(present) < 2:
                continue
            count += 1
            stored = [name for name in present if name in packed]
            if stored and len(stored) < len(present):
                plain = sorted(set(present) - set(stored))
                raise IntegrityError(
                    f"vLLM loads {', '.join(present)} as one layer; {', '.join(plain)} is not quantized and the rest is"
                )
            widths = {tuple(tensors[f"{name}.weight_scale"].shape[1:]) for name in stored}
            if len(widths) > 1:
                raise IntegrityError(f"the scales of {', '.join(present)} have groups of different sizes")
    return count


def account(source: ModelSource, folder: Path) -> TensorFates:
    """Return what became of the source's tensors."""
    tensors = tensor_entries(folder)
    fates = TensorFates([], [], [])
    tied = bool(source.tied_embeddings)
    for name in source.tensors:
        stem = name.removesuffix(".weight")
        if name in tensors or (tied and name == "lm_head.weight"):
            fates.kept.append(name)
        elif f"{stem}.{_PACKED}" in tensors:
            fates.quantized.append(name)
        else:
            fates.dropped.append(name)
    return fates
