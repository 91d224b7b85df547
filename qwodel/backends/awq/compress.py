"""One calibration from clean weights to saved files: what a process does, alone or beside others."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwodel.backends.awq.bridge import CalibrationProgress, Report, bridged
from qwodel.backends.awq.loading import load_model
from qwodel.backends.awq.options import AWQOptions
from qwodel.backends.awq.recipe import choose_group_size, choose_symmetry, make_modifiers, targets
from qwodel.backends.awq.upstream import own_weights, part_ways, without_accelerator
from qwodel.exceptions import ConversionError, QuantizationError
from qwodel.hardware import is_out_of_memory
from qwodel.process_state import MODEL_BUILDING, without_warnings

__all__ = ["PROBE_TOKENS", "Compression", "Outcome", "compress"]

PROBE_TOKENS = 64
_log = logging.getLogger("AWQQuantizer")


@dataclass(frozen=True)
class Compression:
    """What to do: a model, tokens to calibrate on, and where the result goes.

    ``tokens`` is a ``.npy`` file of int64 ids ``[samples, sequence]``.
    """

    model: Path
    architecture: str
    tokens: Path
    target: Path
    batch_size: int
    options: AWQOptions


@dataclass
class Outcome:
    """What was learned: which layers, which groups, what saw no data, and the model's answer to a probe."""

    group_size: int
    symmetric: bool
    quantized: list[str]
    untouched: list[str]
    tokens_seen: dict[str, int] = field(default_factory=dict)
    probe_logits: Any = None


def compress(work: Compression, report: Report, *, rank: int = 0, world: int = 1) -> Outcome:
    """Calibrate, quantize and save one model; with ``world`` processes each takes its share of the samples.

    Raises:
        ValidationError: the architecture has no wiring AWQ could use.
        ConfigurationError: the group size divides nothing.
        ConversionError: llm-compressor failed; its own words are in the message.
    """
    with bridged(), MODEL_BUILDING:
        from llmcompressor.entrypoints.oneshot import oneshot

        model = load_model(work.model, work.architecture, linear_experts=True)
    layers = targets(model, work.options)
    group_size = choose_group_size(
        {name: layer.in_features for name, layer in layers.items()}, work.options.group_size
    )
    symmetric = choose_symmetry(model, work.options)
    modifiers = make_modifiers(model, work.options, group_size, symmetric, layers)
    tokens = np.load(work.tokens, allow_pickle=False)
    batches = _batches(tokens[rank::world], work.batch_size)
    listener = CalibrationProgress(report, _searches(model))
    private = world > 1 and own_weights(model)
    with _failures(), _own_session():
        with bridged(listener), without_accelerator(), _counting(layers) as counts:
            oneshot(
                model=model,
                processor=_NoProcessor(),
                recipe=modifiers,
                dataset=batches,
                pipeline="sequential",
                moe_calibrate_all_experts=work.options.moe_calibrate_all_experts,
            )
        seen = _of_all_processes(counts) if world > 1 else counts
        outcome = Outcome(
            group_size, symmetric, list(layers), [name for name in layers if not seen[name]], dict(seen)
        )
        if rank == 0:
            _warn_of_untouched(outcome)
            outcome.probe_logits = _probe(model, tokens)
        # transformers warns of offloaded modules, which are here on purpose.
        with bridged(), without_warnings(), part_ways() if private else nullcontext():
            if rank == 0 or not private:
                model.save_pretrained(
                    work.target, save_compressed=True, max_shard_size=work.options.max_shard_size
                )
    return outcome


@contextmanager
def _own_session() -> Iterator[None]:
    """Let go of the model that llm-compressor's global session holds, also after a failure."""
    from llmcompressor.core import reset_session

    try:
        yield
    finally:
        reset_session()  # type: ignore[no-untyped-call]


def _of_all_processes(counts: Counter[str]) -> Counter[str]:
    import torch.distributed as dist

    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, counts)
    return sum(gathered, Counter())


def _warn_of_untouched(outcome: Outcome) -> None:
    if outcome.untouched:
        _log.warning(
            "%d of %d layers saw no calibration data: %s …",
            len(outcome.untouched), len(outcome.quantized), outcome.untouched[0],
        )  # fmt: skip


class _NoProcessor:
    """Stands where llm-compressor would load a tokenizer; the tokens are there already."""


def _batches(tokens: Any, batch_size: int) -> Any:
    import torch
    from torch.utils.data import DataLoader

    rows = torch.from_numpy(np.ascontiguousarray(tokens))
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    return DataLoader(samples, batch_size=batch_size)  # type: ignore[arg-type]


def _searches(model: Any) -> float:
    """Return how many scale searches a block has, about: a norm before attention and MLP, and two inner pairs."""
    config = model.config.get_text_config(decoder=True)
    return 4.0 if getattr(config, "num_hidden_layers", 0) else 1.0


@contextmanager
def _counting(layers: Any) -> Iterator[Counter[str]]:
    """Count the tokens each layer is given while the block runs."""
    seen: Counter[str] = Counter()

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Any, ...]) -> None:
            if inputs:
                seen[name] += inputs[0].numel() // max(inputs[0].shape[-1], 1)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _probe(model: Any, tokens: Any) -> Any:
    """Return the fake-quantized model's logits on the first tokens, float32 ``[1, tokens, vocabulary]``."""
    import torch

    ids = torch.from_numpy(np.ascontiguousarray(tokens[:1, :PROBE_TOKENS]))
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        return model(input_ids=ids.to(device), use_cache=False).logits.float().cpu()


@contextmanager
def _failures() -> Iterator[None]:
    """Turn what llm-compressor raises into our error; memory running out passes for the backoff."""
    try:
        yield
    except QuantizationError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ConversionError(
            f"llm-compressor failed: {reason}", hint="--verbose shows its traceback"
        ) from error
