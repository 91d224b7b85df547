"""A checkpoint plan's codes by calibration: the plan says what, the model's own blocks say how well."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwodel.algorithms.data_aware import DataAware, RoundedWeight, RoundingReport
from qwodel.algorithms.gram import InputStatistics
from qwodel.calibration import DEFAULT_DATASET, CalibrationSpec, holds_token_ids, load_tokens
from qwodel.checkpoint.code_store import CodeStore
from qwodel.checkpoint.dequantize_sources import resolve_sources
from qwodel.checkpoint.plan import Plan, TensorPlan
from qwodel.checkpoint.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.rounding import FromStore
from qwodel.checkpoint.statistics import write_statistics
from qwodel.checkpoint.storage_format import StorageFormat
from qwodel.checkpoint.tensor_work import weight_rows
from qwodel.exceptions import (
    ConversionError,
    DependencyError,
    QuantizationError,
    ResourceError,
    ValidationError,
)
from qwodel.hardware import return_free_memory
from qwodel.modeling.blockwise import quantize_blockwise, round_stored
from qwodel.modeling.collect import collect_blockwise, kept_statistics
from qwodel.modeling.lazy_model import LazyModel, config_of, open_lazily
from qwodel.modeling.model_blocks import ModelBlocks
from qwodel.output import StagedOutput, disk_errors
from qwodel.progress import Progress, ProgressCallback

__all__ = [
    "CalibrationOptions",
    "calibration_batches",
    "collect_from_checkpoint",
    "find_codes",
    "load_tokenizer",
    "open_checkpoint",
]

log = logging.getLogger(__name__)

_LEAST_TOKENS = 16384
_TOKENS_A_COLUMN = 2  # twice as many inputs as channels: fewer, and the Gram matrix is mostly noise


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Which text a model is run on, and how.

    Attributes:
        dataset: a file, a folder, a hub dataset or an iterable.
        num_samples: sequences; by default as many as hold 16,384 tokens, and two for each input
            channel of the widest layer.
        seq_length: tokens a sequence.
        batch_size: sequences run together.
        split, column, token: of a hub dataset: its split, text column and access token.
        seed: of the choice of sequences.
        device: where blocks are run.
    """

    dataset: CalibrationSpec = DEFAULT_DATASET
    num_samples: int | None = None
    seq_length: int = 512
    batch_size: int = 4
    split: str = "train"
    column: str | None = None
    token: str | None = field(default=None, repr=False)
    seed: int = 0
    device: str = "cpu"


def find_codes(
    plan: Plan,
    folder: Path,
    calibration: CalibrationOptions,
    method: DataAware,
    progress: Progress,
    *,
    batches: Sequence[Mapping[str, Any]] | None = None,
    prepare: Callable[[nn.Module], object] | None = None,
    even: bool = False,
) -> tuple[Plan, dict[str, RoundingReport]]:
    """Run the plan's model on calibration text and find the codes of every weight that waits for them.

    Args:
        plan: weights whose rounding is a :class:`~qwodel.checkpoint.rounding.FromStore` are concerned.
        folder: an empty folder for the codes, until the plan has been carried out.
        calibration: the text.
        method: how codes are chosen.
        progress: its stage ``calibrate`` advances.
        batches: what the model is called with, where the text was cut into tokens before.
        even: see :class:`~qwodel.modeling.recorder.InputRecorder`.
        prepare: is given the model before it runs, to hook what its reader does with inputs.

    Returns:
        the plan with the place of its codes filled in, and how each layer's were found.

    Raises:
        CalibrationError: the text is missing or too little.
        ConfigurationError: transformers does not know the architecture.
        DependencyError: transformers, accelerate or the tokenizer's package is missing.
        ConversionError: the model does not run.
        ValidationError: NaN or Inf among weights or inputs.
        Cancelled: the progress callback raised.
    """
    tasks = {
        each.name.removesuffix(".weight"): each.format
        for each in plan.tensors
        if isinstance(each.rounding, FromStore) and each.format and each.format.quant_type
    }
    progress.stage("calibrate", "reading the calibration text")
    widest = max(each.source.shape[1] for each in plan.tensors if isinstance(each.rounding, FromStore))
    with UnifiedSafetensorsLoader(plan.source, low_memory=True) as reader:
        lazy = _open(plan, reader, torch.device(calibration.device))
        if batches is None:
            batches = list(calibration_batches(plan.source, lazy.model.config, calibration, widest))
        if prepare is not None:
            prepare(lazy.model)

        def solve(
            weights: Sequence[torch.Tensor], task: StorageFormat, statistics: InputStatistics | None
        ) -> list[RoundedWeight]:
            return round_stored(weights, task, statistics, method)

        return_free_memory()
        with _explained(lazy, calibration):
            reports = quantize_blockwise(
                lazy,
                tasks,
                batches,
                solve,
                CodeStore(folder),
                progress,
                even=even,
                asymmetric=method.method == "gptaq",
            )
    return_free_memory()
    filled = tuple(_filled(each, folder) for each in plan.tensors)
    return replace(plan, tensors=filled), reports


def collect_from_checkpoint(
    folder: Path,
    path: Path,
    calibration: CalibrationOptions,
    *,
    gram: bool = True,
    progress_callback: ProgressCallback | None = None,
    overwrite: bool = False,
) -> Path:
    """Run a model directory on calibration text, block by block, and keep what its linear layers read.

    Memory holds one block and the batches' hidden states; statistics go to disk block by block.

    Args:
        folder: the model directory.
        path: the statistics file to write.
        calibration: the text.
        gram: keep Gram matrices, not only means and greatest values.
        progress_callback: gets ``(percent, stage, message)``.
        overwrite: replace an existing file.

    Returns:
        ``path``.

    Raises:
        as :func:`find_codes`.
    """
    progress = Progress(progress_callback, {"resolve": 1, "calibrate": 95, "publish": 4})
    with (
        StagedOutput(path, overwrite=overwrite) as output,
        UnifiedSafetensorsLoader(folder, low_memory=True) as reader,
        disk_errors(f"collecting statistics for {path}"),
    ):
        progress.stage("calibrate", "reading the calibration text")
        lazy = open_checkpoint(Path(folder), reader, device=calibration.device)
        blocks = ModelBlocks.of(lazy)
        widest = max(
            (each.in_features for each in lazy.model.modules() if isinstance(each, nn.Linear)), default=1
        )
        batches = list(calibration_batches(Path(folder), lazy.model.config, calibration, widest))
        with _explained(lazy, calibration):
            described = collect_blockwise(blocks, batches, output.scratch, progress, gram=gram)
        progress.stage("publish", path.name)
        write_statistics(output.path, kept_statistics(described, output.scratch), described)
        output.publish({"layers": {entry.layers[0]: entry.count for entry in described}})
    progress.complete(str(path))
    return path


def open_checkpoint(
    folder: Path,
    reader: UnifiedSafetensorsLoader,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LazyModel:
    """A model directory as a lazy model of the numbers its tensors stand for, codes decoded.

    Args:
        folder: the model directory.
        reader: its open checkpoint, which must stay open.
        dtype: to compute in; fp32 where most tensors are, else bf16.
        device: where loaded parts live.

    Raises:
        ValidationError: it is quantized in a way that is not understood.
        ConfigurationError: transformers does not know the architecture.
    """
    config = config_of(folder)
    tensors = {each.name: each for each in resolve_sources(reader, config).tensors}

    def read(name: str) -> torch.Tensor:
        source = tensors[name]
        if source.shape:
            return source.row_decoder.rows(reader, 0, source.shape[0])
        return reader.get_tensor(source.stored[0])

    wide = sum(each.dtype in ("F32", "F64") for each in tensors.values()) * 2 > len(tensors)
    dtype = dtype or (torch.float32 if wide else torch.bfloat16)
    return open_lazily(config, tensors, read, dtype=dtype, device=device)


@contextmanager
def _explained(lazy: LazyModel, calibration: CalibrationOptions) -> Iterator[None]:
    """Turn what a model's own code raises into errors with a cause and a cure."""
    try:
        yield
    except QuantizationError:
        raise
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{calibration.device} has no room for a block and {calibration.batch_size} sequences",
            hint="pass a smaller batch_size or seq_length, or device='cpu'",
        ) from error
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise ConversionError(
            f"{type(lazy.model).__name__} does not run block by block: {error}",
            hint="run it yourself with qwodel.modeling.collect_statistics and pass the file",
        ) from error


def _filled(tensor: TensorPlan, folder: Path) -> TensorPlan:
    if not isinstance(tensor.rounding, FromStore):
        return tensor
    return replace(tensor, rounding=FromStore(folder, tensor.rounding.name))


def _open(plan: Plan, reader: UnifiedSafetensorsLoader, device: torch.device) -> LazyModel:
    tensors = {each.name: each for each in plan.tensors}

    def read(name: str) -> torch.Tensor:
        tensor = tensors[name]
        shape = tensor.source.shape
        return weight_rows(reader, tensor, 0, shape[0]) if shape else weight_rows(reader, tensor, 0, 1)[0]

    return open_lazily(config_of(plan.source), tensors, read, dtype=_compute_dtype(plan), device=device)


def _compute_dtype(plan: Plan) -> torch.dtype:
    """fp32 for a source in fp32; else bf16, which has the range that fp16 lacks."""
    wide = sum(each.output_bytes for each in plan.tensors if each.source.dtype in ("F32", "F64"))
    narrow = sum(each.output_bytes for each in plan.tensors if each.source.dtype not in ("F32", "F64"))
    return torch.float32 if wide > narrow else torch.bfloat16


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        DependencyError: transformers is not installed.
        ValidationError: there is no tokenizer, or none that loads.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DependencyError(
            "reading calibration text needs transformers", hint="pip install 'qwodel[calibrate]'"
        ) from error
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Tokenizers fail in many ways; the text says which.
        raise ValidationError(
            f"{folder} has no tokenizer that loads: {error}",
            hint="put tokenizer.json beside the weights, or give calibration data as lists of token ids",
        ) from error


def calibration_batches(
    folder: Path, config: Any, options: CalibrationOptions, widest: int
) -> Iterator[Mapping[str, Any]]:
    """Keyword arguments of a transformers model's forward pass, batch by batch.

    Args:
        folder: the model directory, for its tokenizer.
        config: the model's configuration.
        options: the text.
        widest: input channels of the widest layer.

    Raises:
        CalibrationError: the text is missing or too little.
        ValidationError: there is no tokenizer.
    """
    text = getattr(config, "get_text_config", lambda: config)()
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    length = min(options.seq_length, context) if isinstance(context, int) else options.seq_length
    wanted = max(_LEAST_TOKENS, _TOKENS_A_COLUMN * widest)
    tokens = load_tokens(
        options.dataset,
        None if holds_token_ids(options.dataset) else load_tokenizer(folder),
        num_samples=options.num_samples or -(-wanted // length),
        seq_length=options.seq_length,
        seed=options.seed,
        split=options.split,
        token=options.token,
        column=options.column,
        context_length=context if isinstance(context, int) else None,
    )
    log.info("calibrating on %d sequences of %d tokens", *tokens.shape)
    for start in range(0, len(tokens), options.batch_size):
        ids = torch.from_numpy(tokens[start : start + options.batch_size]).to(options.device)
        batch: dict[str, Any] = {"input_ids": ids}
        if getattr(config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = ids
        if hasattr(text, "use_cache"):
            batch["use_cache"] = False
        yield batch
