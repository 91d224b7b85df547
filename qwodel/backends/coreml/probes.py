"""Inputs on which a model, its wrapper, its trace and its written program must agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qwodel.backends.coreml.wrappers import Output, Traceable
from qwodel.exceptions import ConversionError

__all__ = ["Agreement", "Probe", "Runner", "agreement", "prove", "references", "run_module", "text_probes"]

Tensor = torch.Tensor
_SEED = 0
_POSITIONS = 32  # compared a probe, so that logits of a large vocabulary stay small
_TOLERANCE = 1e-4  # float32 in another order


@dataclass(frozen=True)
class Probe:
    """Inputs by name; ``valid`` of ``tokens`` are no padding (both 0 where there are no tokens)."""

    inputs: Mapping[str, Tensor]
    tokens: int = 0
    valid: int = 0

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.valid} valid" if self.tokens else "the given inputs"


Runner = Callable[[Probe], list[Tensor]]
"""Gives the outputs of a probe, in the order of the model's outputs."""


def text_probes(
    lengths: Iterable[int],
    *,
    batch: int,
    vocabulary: int,
    pad: int | None,
    segments: bool,
    padded: bool = True,
) -> list[Probe]:
    """Random tokens of several lengths, each whole and, where ``padded``, with padding on the right."""
    generator = torch.Generator().manual_seed(_SEED)
    filler = pad if pad is not None and 0 <= pad < vocabulary else 0
    probes = []
    for length in sorted(set(lengths)):
        for valid in sorted({length, max(1, length * 2 // 3)} if padded else {length}):
            # RoBERTa takes the padding id for padding wherever it stands.
            ids = torch.randint(1, vocabulary, (batch, length), generator=generator)
            ids = (ids - 1) + (ids - 1 >= filler).long() if vocabulary > 1 else ids * 0
            mask = (torch.arange(length) < valid).long().expand(batch, -1).contiguous()
            inputs = {"input_ids": torch.where(mask.bool(), ids, filler), "attention_mask": mask}
            if segments:
                second = (torch.arange(length) >= (valid + 1) // 2).long() * mask
                inputs["token_type_ids"] = second
            probes.append(Probe({name: each.int() for name, each in inputs.items()}, length, valid))
    return probes


@torch.no_grad()
def references(run: Runner, probes: list[Probe], outputs: tuple[Output, ...]) -> list[list[Tensor]]:
    """Run every probe; keep some positions of each output."""
    return [_sampled(run(probe), probe, outputs) for probe in probes]


def _sampled(found: list[Tensor], probe: Probe, outputs: tuple[Output, ...]) -> list[Tensor]:
    if not probe.tokens:
        return [each.detach().float().clone() for each in found]
    positions = torch.linspace(0, probe.valid - 1, min(probe.valid, _POSITIONS)).long()
    return [
        (each[:, positions] if output.per_token else each).detach().float().clone()
        for each, output in zip(found, outputs, strict=True)
    ]


def run_module(module: Callable[..., Any], traceable: Traceable) -> Runner:
    """Return a runner of a wrapper or its trace; a stateful one is fed a beginning, then token by token."""

    def whole(probe: Probe) -> list[Tensor]:
        found = module(*(probe.inputs[each.name] for each in traceable.inputs))
        return list(found) if isinstance(found, tuple) else [found]

    def in_steps(probe: Probe) -> list[Tensor]:
        for name, buffer in module.named_buffers():  # type: ignore[attr-defined]
            if name.rpartition(".")[2] in {state.name for state in traceable.states}:
                buffer.zero_()
        ids, mask = probe.inputs["input_ids"], probe.inputs["attention_mask"]
        return [torch.cat([module(ids[:, a:b], mask[:, :b]) for a, b in steps(probe.tokens)], 1)]

    return in_steps if traceable.states else whole


def steps(tokens: int) -> list[tuple[int, int]]:
    """How a stateful model is fed: two thirds at once, then one by one."""
    first = max(1, tokens * 2 // 3)
    return [(0, first), *((at, at + 1) for at in range(first, tokens))]


@torch.no_grad()
def prove(
    what: str, run: Runner, probes: list[Probe], expected: list[list[Tensor]], outputs: tuple[Output, ...]
) -> float:
    """Return the largest error relative to the largest output, over all probes.

    Raises:
        ConversionError: it is more than float32 explains.
    """
    worst = 0.0
    for probe, wanted in zip(probes, expected, strict=True):
        for output, mine, other in zip(outputs, _sampled(run(probe), probe, outputs), wanted, strict=True):
            error = float((mine - other).abs().max() / other.abs().max().clamp_min(1e-12))
            if not error <= _TOLERANCE:
                raise ConversionError(
                    f"{what} does not compute what the model does: {output.name} differs by {error:.1e} on {probe}",
                    hint="the architecture does something that a traced program with explicit masks and positions "
                    "cannot follow; trace the model yourself and give the TorchScript file",
                )
            worst = max(worst, error)
    return worst


@dataclass(frozen=True)
class Agreement:
    """How two sets of outputs agree.

    ``relative_error`` is ‖a − b‖ / ‖b‖, ``cosine`` the least one over positions, ``kl`` the mean
    divergence KL(b ‖ a) in nats where outputs are scores, else ``None``.
    """

    relative_error: float
    cosine: float
    kl: float | None

    def as_dict(self) -> dict[str, Any]:
        """Rounded, for a manifest."""
        return {
            "relative_error": float(f"{self.relative_error:.3g}"),
            "cosine": round(self.cosine, 6),
            "kl": None if self.kl is None else float(f"{self.kl:.3g}"),
        }


@torch.no_grad()
def agreement(
    run: Runner, probes: list[Probe], expected: list[list[Tensor]], outputs: tuple[Output, ...]
) -> Agreement:
    """Compare the outputs of ``run`` with the expected ones, over all probes."""
    error = power = divergence = 0.0
    cosine, rows = 1.0, 0
    for probe, wanted in zip(probes, expected, strict=True):
        for output, mine, other in zip(outputs, _sampled(run(probe), probe, outputs), wanted, strict=True):
            if not torch.isfinite(mine).all():
                return Agreement(math.inf, -1.0, math.inf)
            error += float((mine - other).double().square().sum())
            power += float(other.double().square().sum())
            flat, wanted_flat = mine.flatten(0, -2).double(), other.flatten(0, -2).double()
            cosine = min(cosine, float(torch.cosine_similarity(flat, wanted_flat, dim=1).min()))
            if output.name.endswith("logits"):
                target = wanted_flat.log_softmax(-1)
                divergence += float((target.exp() * (target - flat.log_softmax(-1))).sum())
                rows += len(flat)
    return Agreement(math.sqrt(error / max(power, 1e-30)), cosine, divergence / rows if rows else None)
