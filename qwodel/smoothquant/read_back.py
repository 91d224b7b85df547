"""What was saved against what was meant: logits of the codes, as each reader computes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwodel.checkpoint.decisions import Action
from qwodel.checkpoint.plan import Plan
from qwodel.checkpoint.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.transformers_layout import TransformersLayout
from qwodel.exceptions import IntegrityError
from qwodel.modeling.calibrated import open_checkpoint
from qwodel.smoothquant.input_rotation import rotate_inputs
from qwodel.smoothquant.int8_model import Int8ForCausalLM
from qwodel.smoothquant.scheme import Scheme
from qwodel.smoothquant.simulate import fake_quantized, quantizable_layers

__all__ = ["logits_of", "probe_tokens", "quantized_layers", "read_back", "relative_error", "simulate_saved"]

log = logging.getLogger(__name__)

_PROBE_TOKENS = 32
_BOUND = 3e-2
"""Relative difference of logits that inputs at the border between two codes explain."""
_TOKEN_STEPS = {"int8": None, "transformers": 127.5}
"""What each reader divides a token's greatest value by (127 where ``None``)."""


def quantized_layers(plan: Plan) -> list[str]:
    """Names of the layers that a plan quantizes."""
    return [each.name.removesuffix(".weight") for each in plan.tensors if each.action is Action.QUANTIZE]


def simulate_saved(
    target: Path, plan: Plan, scheme: Scheme, scales: Mapping[str, float], probe: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Logits of an fp32 model of what the saved codes stand for, with inputs rounded as readers do."""
    with UnifiedSafetensorsLoader(target, low_memory=True) as reader:
        lazy = open_checkpoint(target, reader, dtype=torch.float32)
        lazy.load(lazy.model, "")
    model = lazy.model
    model.tie_weights()
    names = set(quantized_layers(plan))
    layers = {name: layer for name, layer in quantizable_layers(model).items() if name in names}
    rotate_inputs(model, scheme)
    # Codes are on the grid already, and the rotation of inputs is the model's own.
    plain = replace(scheme, rotate_inputs=0)
    has_experts = isinstance(plan.layout, TransformersLayout) and plan.layout.packed_experts
    found = {}
    for reader_name, steps in _TOKEN_STEPS.items():
        with fake_quantized(
            model,
            plain,
            input_scales=scales or None,
            layers=layers,
            weights=False,
            token_steps=steps,
            experts=reader_name == "int8" and has_experts,
        ):
            found[reader_name] = logits_of(model, probe)
    return found


def read_back(
    target: Path, scheme: Scheme, probe: torch.Tensor, expected: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    ours = Int8ForCausalLM.from_pretrained(target, dtype=torch.float32)
    found = {"int8": relative_error(logits_of(ours.model, probe), expected["int8"])}
    del ours
    if not scheme.rotate_inputs and (theirs := _transformers(target)) is not None:
        found["transformers"] = relative_error(logits_of(theirs, probe), expected["transformers"])
    for reader, error in found.items():
        if not error <= _BOUND:
            raise IntegrityError(
                f"read back by {reader}, the model's logits differ by {error:.2g} from those of its codes "
                f"(bound {_BOUND:g})"
            )
    return found


def _transformers(target: Path) -> Any:
    """The directory as transformers loads it; ``None`` without compressed-tensors."""
    from importlib.util import find_spec

    if find_spec("compressed_tensors") is None:
        log.warning("compressed-tensors is not installed: transformers' own reading is not checked")
        return None
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, local_files_only=True).eval()
    except Exception as error:
        # transformers and compressed-tensors raise what they like.
        raise IntegrityError(f"transformers cannot load what was written: {error}") from error


def probe_tokens(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(model.get_input_embeddings().num_embeddings, (1, _PROBE_TOKENS), generator=generator)


@torch.no_grad()
def logits_of(model: Any, probe: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=probe, use_cache=False).logits
    return logits.double()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
