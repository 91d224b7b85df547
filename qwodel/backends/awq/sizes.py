"""How much a run calibrates at once: what was asked for, else what the free memory suggests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qwodel.backends.awq.options import AWQOptions
from qwodel.hardware import CalibrationSizes, auto_sizes, headroom, list_gpus, refine_batch
from qwodel.model_config import context_length, text_config
from qwodel.source import ModelSource

__all__ = ["StartingSizes", "estimated_bytes", "measured_peak", "starting_sizes"]

_DTYPE_BYTES = {"F64": 8, "F32": 4}
_log = logging.getLogger("AWQQuantizer")


@dataclass(frozen=True)
class StartingSizes:
    """The first sizes to try; the headroom they follow from; and an estimate of the bytes sizes take."""

    sizes: CalibrationSizes
    headroom: int
    free: int
    estimate: Callable[[CalibrationSizes], int]


def starting_sizes(source: ModelSource, options: AWQOptions) -> StartingSizes:
    """Return the sizes a run starts with: options as given, the rest from :data:`qwodel.hardware.VRAM_TABLE`."""
    width = _width(source)
    model_bytes = sum(count * _DTYPE_BYTES.get(dtype, 2) for dtype, count in source.dtypes.items())
    left = headroom(model_bytes)
    table = auto_sizes(left)
    context = context_length(source.config)
    wanted = CalibrationSizes(
        options.batch_size or table.batch_size,
        options.seq_length or min(table.seq_length, context or table.seq_length),
        options.num_samples or table.num_samples,
    )
    if options.batch_size is None:
        wanted = replace(wanted, batch_size=min(wanted.batch_size, wanted.num_samples))
        if list_gpus():
            wanted = _by_measure(source, wanted, left)
    _log.info("calibrating with %s; headroom %.2f GiB", wanted, left / (1 << 30))
    config = text_config(source.config)

    def estimate(sizes: CalibrationSizes) -> int:
        return estimated_bytes(config, width, sizes)

    return StartingSizes(wanted, left, max(left + model_bytes, 0), estimate)


def estimated_bytes(config: Any, width: int, sizes: CalibrationSizes) -> int:
    """Return about how many bytes one block's calibration takes, with ``width`` bytes a number.

    Two copies of the block's weights, the activations of one batch, and the inputs and outputs of
    attention, MLP and block that AWQ keeps for every sample.
    """
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    inner = int(config.get("intermediate_size") or config.get("ffn_dim") or 4 * hidden)
    weights = 2 * (4 * hidden * hidden + 3 * hidden * inner)
    batch = sizes.batch_size * sizes.seq_length * (8 * hidden + 4 * inner)
    kept = sizes.num_samples * sizes.seq_length * hidden * 6
    return width * (weights + batch + kept)


def _by_measure(source: ModelSource, sizes: CalibrationSizes, free: int) -> CalibrationSizes:
    try:
        return refine_batch(sizes, lambda batch: measured_peak(source, batch, sizes.seq_length), free)
    except Exception as error:
        # Some architectures cannot be built with one layer; the table's batch and the backoff remain.
        _log.info("no measured pass of this architecture: %s", error)
        return sizes


def measured_peak(source: ModelSource, batch: int, seq_length: int, device: str = "cuda") -> int:
    """Return the peak bytes beyond its weights of a forward pass of the model cut to one layer.

    On ``"cuda"`` it is the allocator's own count; on another device that of tensors alive at once.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qwodel.backends.awq.live_bytes import LiveBytes

    config = AutoConfig.from_pretrained(source.path, local_files_only=True).get_text_config(decoder=True)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=_torch_dtype(source)).eval()
        ids = torch.zeros((batch, seq_length), dtype=torch.int64)
        mask = torch.ones_like(ids)
    body = model.get_decoder() if hasattr(model, "get_decoder") else model
    with torch.no_grad():
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            body(input_ids=ids, attention_mask=mask, use_cache=False)
            return int(torch.cuda.max_memory_allocated() - before)
        with LiveBytes() as live:
            body(input_ids=ids, attention_mask=mask, use_cache=False)
    return int(live.peak)


def _torch_dtype(source: ModelSource) -> Any:
    import torch

    names = {"F32": torch.float32, "F16": torch.float16, "F64": torch.float64}
    return names.get(max(source.dtypes, key=lambda name: source.dtypes[name], default=""), torch.bfloat16)


def _width(source: ModelSource) -> int:
    return max((_DTYPE_BYTES.get(dtype, 2) for dtype in source.dtypes), default=2)
