"""What was saved against what was meant: logits of the codes, as each reader computes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwodel.checkpoint.layouts.transformers import TransformersLayout
from qwodel.checkpoint.plan.plan import Plan
from qwodel.checkpoint.run.carry_out import CarriedOut
from qwodel.checkpoint.tensors import Action
from qwodel.exceptions import IntegrityError
from qwodel.modeling.calibrated import open_checkpoint
from qwodel.modeling.empty_models import tie_weights
from qwodel.process_state import MODEL_BUILDING
from qwodel.smoothquant.input_rotation import rotate_inputs
from qwodel.smoothquant.int8_model import Int8ForCausalLM
from qwodel.smoothquant.scheme import Scheme
from qwodel.smoothquant.simulate import fake_quantized, quantizable_layers
from qwodel.smoothquant.stacked_experts import stacked_experts

__all__ = [
    "Expected",
    "logits_of",
    "probe_tokens",
    "quantized_layers",
    "read_back",
    "relative_error",
    "simulate_saved",
]

log = logging.getLogger(__name__)

_PROBE_TOKENS = 32
_BOUND = 3e-2
"""Relative difference of logits that inputs at the border between two codes explain, at least."""
_LAYER_BOUND = 5e-3
"""The same of one layer's outputs, given the same inputs."""
_TOKEN_STEPS = {"int8": None, "transformers": 127.5}
"""What each reader divides a token's greatest value by (127 where ``None``)."""


def quantized_layers(plan: Plan) -> list[str]:
    """Names of the layers that a plan quantizes."""
    return [each.name.removesuffix(".weight") for each in plan.tensors if each.action is Action.QUANTIZE]


@dataclass(frozen=True, slots=True)
class Expected:
    """What readers of a directory should compute.

    Attributes:
        logits: by reader.
        layers: name of a layer → what ours is called with, and what it then gives.
    """

    logits: Mapping[str, torch.Tensor]
    layers: Mapping[str, tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]]


def simulate_saved(
    done: CarriedOut, scheme: Scheme, scales: Mapping[str, float], probe: torch.Tensor
) -> Expected:
    """Run an fp32 model of what the saved codes stand for, with inputs rounded as readers do."""
    plan = done.plan
    with done.output.open() as reader:
        lazy = open_checkpoint(done.output, reader, dtype=torch.float32)
        lazy.load(lazy.model, "")
    model = lazy.model
    tie_weights(model)
    names = set(quantized_layers(plan))
    layers = {name: layer for name, layer in quantizable_layers(model).items() if name in names}
    experts = isinstance(plan.layout, TransformersLayout) and plan.layout.packed_experts
    taps = _Taps({**layers, **(stacked_experts(model) if experts else {})})
    rotate_inputs(model, scheme)
    # Codes are on the grid already, and the rotation of inputs is the model's own.
    plain = replace(scheme, rotate_inputs=0)
    found = {}
    for name, steps in _TOKEN_STEPS.items():
        ours = name == "int8"
        with fake_quantized(
            model,
            plain,
            input_scales=scales or None,
            layers=layers,
            weights=False,
            token_steps=steps,
            experts=ours and experts,
        ):
            found[name] = logits_of(model, probe)
        if ours:
            taps.remove()
    return Expected(found, taps.seen)


class _Taps:
    """Remembers what layers are given, before any other hook, and what they return."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.seen: dict[str, tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = {}
        self._given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._hooks = []
        for name, layer in layers.items():
            self._hooks.append(layer.register_forward_pre_hook(partial(self._before, name), with_kwargs=True))
            self._hooks.append(layer.register_forward_hook(partial(self._after, name)))

    def _before(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given[name] = args, kwargs

    def _after(self, name: str, _: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.seen[name] = (*self._given.pop(name), output)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def read_back(
    target: Path, scheme: Scheme, probe: torch.Tensor, expected: Expected, rounding: float
) -> dict[str, float]:
    """Load what was written with each reader; return the errors of its logits, and of ours the worst layer's.

    Args:
        rounding: relative error that rounding makes in the logits. An input at the border between two
            codes falls one way or the other, and layers behind it amplify that to an error of this size.

    Raises:
        IntegrityError: a reader fails, or computes something else.
    """
    ours = Int8ForCausalLM.from_pretrained(target, dtype=torch.float32)
    worst = _worst_layer(ours.model, expected)
    found = {"int8": relative_error(logits_of(ours.model, probe), expected.logits["int8"])}
    del ours
    if not scheme.rotate_inputs and (theirs := _transformers(target)) is not None:
        found["transformers"] = relative_error(logits_of(theirs, probe), expected.logits["transformers"])
    bound = max(_BOUND, rounding)
    for reader, error in found.items():
        if not error <= bound:
            raise IntegrityError(
                f"read back by {reader}, the model's logits differ by {error:.2g} from those of its codes "
                f"(bound {bound:.2g})"
            )
    return {**found, "int8_layer": worst}


@torch.no_grad()
def _worst_layer(model: nn.Module, expected: Expected) -> float:
    """The greatest relative error of an INT8 layer that is given what the simulation's was given."""
    worst = 0.0
    for name, (args, kwargs, output) in expected.layers.items():
        error = relative_error(model.get_submodule(name)(*args, **kwargs), output)
        if not error <= _LAYER_BOUND:
            raise IntegrityError(
                f"read back, the outputs of {name} differ by {error:.2g} from those of its codes "
                f"(bound {_LAYER_BOUND:g})"
            )
        worst = max(worst, error)
    return worst


def _transformers(target: Path) -> Any:
    """The directory as transformers loads it; ``None`` without compressed-tensors."""
    from importlib.util import find_spec

    if find_spec("compressed_tensors") is None:
        log.warning("compressed-tensors is not installed: transformers' own reading is not checked")
        return None
    from transformers import AutoModelForCausalLM

    try:
        with MODEL_BUILDING:
            return AutoModelForCausalLM.from_pretrained(
                target, dtype=torch.float32, local_files_only=True
            ).eval()
    except Exception as error:
        # transformers and compressed-tensors raise what they like.
        raise IntegrityError(f"transformers cannot load what was written: {error}") from error


def probe_tokens(model: Any) -> torch.Tensor:
    """Random token ids ``[1, tokens]``, the same for the same vocabulary."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(model.get_input_embeddings().num_embeddings, (1, _PROBE_TOKENS), generator=generator)


@torch.no_grad()
def logits_of(model: Any, probe: torch.Tensor) -> torch.Tensor:
    """The model's logits of ``[1, tokens]`` ids, fp64 ``[1, tokens, vocabulary]``."""
    logits: torch.Tensor = model(input_ids=probe, use_cache=False).logits
    return logits.double()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
