"""Activation scales: the greatest value of every input channel, computed, written and read.

The ``.pt`` file is the one of the published SmoothQuant tools: a dictionary of module name → fp32
tensor ``[in_features]``, opened with ``weights_only=True``. The safetensors form holds the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwodel.exceptions import (
    CalibrationError,
    ConfigurationError,
    QuantizationError,
    ResourceError,
    ValidationError,
)
from qwodel.output import StagedOutput, disk_errors
from qwodel.smoothquant.observe import ActivationStatistics, mask_of, observe_activations
from qwodel.torch_pickle import check_torch_file
from qwodel.untrusted import checked_path, foreign_errors, kind_of

__all__ = [
    "calibrate",
    "compute_activation_scales",
    "load_activation_scales",
    "save_activation_scales",
    "tokenizer_of",
]


def compute_activation_scales(
    model: nn.Module,
    data_loader: Iterable[Any],
    num_samples: int = 512,
    *,
    tokenizer: Any = None,
    seq_len: int = 512,
) -> dict[str, torch.Tensor]:
    """Run a model on calibration data and return the running maximum of ``|x|`` of every layer's inputs.

    Args:
        model: a transformers language model; runs in evaluation mode, on its own device.
        data_loader: batches as dictionaries, tensors or tuples of token ids ``[batch, tokens]``; or
            texts. Padding that an ``attention_mask`` marks does not count.
        num_samples: sequences (or texts) at most; the batch that would exceed it is cut.
        tokenizer: for texts; that of the directory the model was loaded from where ``None``.
        seq_len: tokens a text is cut to.

    Returns:
        layer → fp32 ``[in_features]`` on the CPU: linear layers, Conv1D, routers and stacked experts.

    Raises:
        CalibrationError: there was no data.
        ConfigurationError: ``num_samples`` below one, or texts without a tokenizer.
        ResourceError: the device is out of memory (a RuntimeError: ``CUDA out of memory …``).
        ValidationError: a layer reads NaN or Inf.
    """
    return calibrate(model, data_loader, num_samples, tokenizer=tokenizer, seq_len=seq_len).peaks


@torch.no_grad()
def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    num_samples: int = 512,
    *,
    tokenizer: Any = None,
    seq_len: int = 512,
    sampled_tokens: int = 0,
) -> ActivationStatistics:
    """As :func:`compute_activation_scales`; with ``sampled_tokens`` also keep inputs, for a search of α.

    Args:
        sampled_tokens: tokens kept of every layer, spread over the batches.
    """
    if num_samples < 1:
        raise ConfigurationError(f"num_samples is at least 1, not {num_samples}")
    batches = list(islice(_batches(model, data, num_samples, tokenizer, seq_len), num_samples))
    if not batches:
        raise CalibrationError(
            "there were no calibration samples", hint="give a data loader that yields batches"
        )
    statistics = ActivationStatistics()
    each = -(-sampled_tokens // len(batches)) if sampled_tokens else 0
    training = model.training
    model.eval()
    try:
        with observe_activations(model, tokens_per_batch=each, statistics=statistics) as observer:
            for batch in batches:
                observer.batch(mask_of(batch))
                _run(model, batch)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"CUDA out of memory while calibrating: {error}",
            hint="use a smaller batch size or sequence length",
        ) from error
    finally:
        model.train(training)
    return statistics


def _run(model: nn.Module, batch: dict[str, Any]) -> None:
    model(**batch, **({"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}))


def _batches(
    model: nn.Module, data: Iterable[Any], count: int, tokenizer: Any, seq_len: int
) -> Iterator[dict[str, Any]]:
    device = next(model.parameters()).device
    left = count
    for item in data:
        if left <= 0:
            return
        batch = _as_keywords(model, item, tokenizer, seq_len)
        size = len(batch["input_ids"])
        batch = {
            name: value[:left].to(device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        left -= size
        yield batch


def _as_keywords(model: nn.Module, item: Any, tokenizer: Any, seq_len: int) -> dict[str, Any]:
    if isinstance(item, list) and item and all(isinstance(each, torch.Tensor) for each in item):
        item = item[0]
    if isinstance(item, Mapping) and "input_ids" not in item and isinstance(item.get("text"), str | list):
        item = item["text"]
    if isinstance(item, str) or (isinstance(item, list | tuple) and item and isinstance(item[0], str)):
        tokenizer = tokenizer or tokenizer_of(model)
        texts = [item] if isinstance(item, str) else list(item)
        if len(texts) > 1 and tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        item = tokenizer(
            texts, return_tensors="pt", truncation=True, max_length=seq_len, padding=len(texts) > 1
        )
    if isinstance(item, Mapping):
        kept = {name: torch.as_tensor(item[name]) for name in ("input_ids", "attention_mask") if name in item}
        if "input_ids" in kept:
            return {name: value if value.ndim > 1 else value[None] for name, value in kept.items()}
        raise CalibrationError(f"a calibration batch has no input_ids, only {', '.join(map(str, item))}")
    ids = torch.as_tensor(item[0] if isinstance(item, tuple) else item)
    return {"input_ids": ids if ids.ndim > 1 else ids[None]}


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer of the directory or hub id a model was loaded from.

    Raises:
        ConfigurationError: the model does not say where it is from, or there is no tokenizer.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    hint = "pass the model's tokenizer as tokenizer="
    if not name:
        raise ConfigurationError(
            "texts need a tokenizer, and the model does not say where it is from", hint=hint
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=Path(name).is_dir())
    except Exception as error:
        # transformers raises OSError, ValueError, ImportError … for a missing tokenizer.
        raise ConfigurationError(
            f"{name} has no tokenizer that transformers can load: {error}", hint=hint
        ) from error


def save_activation_scales(
    scales: Mapping[str, torch.Tensor], path: str | os.PathLike[str], *, overwrite: bool = True
) -> Path:
    """Write scales as ``.pt`` (for any SmoothQuant tool) or, by the name's ending, ``.safetensors``.

    Raises:
        ValidationError: the place cannot be written.
        ResourceError: the disk is full.
    """
    target = Path(path)
    plain = {name: value.detach().float().cpu().contiguous().clone() for name, value in scales.items()}
    with StagedOutput(target, overwrite=overwrite) as output, disk_errors(f"writing {target}"):
        if target.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(plain, output.path, metadata={"format": "pt", "content": "activation scales"})
        else:
            torch.save(plain, output.path)
        output.path.replace(target)
    return target


def load_activation_scales(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read scales that :func:`save_activation_scales` or a published SmoothQuant tool wrote.

    Pickle is opened with ``weights_only=True``: nothing in the file is executed.

    Raises:
        ValidationError: the file is missing or damaged, or holds no dictionary of vectors of finite
            numbers that are at least 0.
    """
    source = checked_path(path)
    if kind_of(source) != "file":
        raise ValidationError(
            f"the activation scales {source} do not exist",
            hint="make them with generate_act_scales, or with compute_activation_scales",
        )
    with _as_scales(source):
        if source.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(source)
        else:
            with source.open("rb") as file:
                check_torch_file(file, str(source))
                loaded = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(name, str) for name in loaded):
        raise ValidationError(f"{source} is no file of activation scales: it holds no dictionary of vectors")
    return {name: _scales(value, f"{source}: the entry {name[:200]!r}") for name, value in loaded.items()}


@contextmanager
def _as_scales(source: Path) -> Iterator[None]:
    what = f"{source} is no file of activation scales"
    try:
        with foreign_errors("it cannot be read"):
            yield
    except QuantizationError as error:
        raise error.within(what) from error


def _scales(value: Any, what: str) -> torch.Tensor:
    vector = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.ndim == 1
    if not vector or value.is_complex() or value.dtype == torch.bool or value.device.type != "cpu":
        raise ValidationError(f"{what} is no vector of activation scales")
    with foreign_errors(what):
        scales: torch.Tensor = value.detach().float()
    if not len(scales) or not scales.isfinite().all() or (scales < 0).any():
        raise ValidationError(
            f"{what} holds scales that no activations have (none, NaN, infinite or negative)",
            hint="make them again with generate_act_scales",
        )
    return scales
