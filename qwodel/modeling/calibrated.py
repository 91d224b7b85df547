"""A checkpoint plan's codes by calibration: the plan says what, the model's own blocks say how well."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwodel.algorithms.data_aware import DataAware, RoundedWeight, RoundingReport
from qwodel.algorithms.gram import InputStatistics
from qwodel.calibration import describe_dataset
from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.formats.codec import Codec
from qwodel.checkpoint.plan.plan import Plan
from qwodel.checkpoint.rounding.code_store import CodeStore
from qwodel.checkpoint.rounding.statistics import write_statistics
from qwodel.checkpoint.run.tensor_work import weight_rows
from qwodel.checkpoint.source.checkpoint import Checkpoint
from qwodel.exceptions import ConversionError, QuantizationError, ResourceError
from qwodel.exhaustion import exhausted
from qwodel.hardware import return_free_memory
from qwodel.hashes import SourceFiles
from qwodel.modeling.blockwise import quantize_blockwise, round_stored
from qwodel.modeling.calibration_batches import CalibrationOptions, calibration_batches
from qwodel.modeling.collect import collect_blockwise, kept_statistics
from qwodel.modeling.lazy_model import LazyModel, described, open_lazily
from qwodel.modeling.model_blocks import ModelBlocks
from qwodel.output import StagedOutput, disk_errors
from qwodel.progress import Progress, ProgressCallback
from qwodel.report import envelope, json_safe, source_facts
from qwodel.side_files import files_beside

__all__ = ["collect_from_checkpoint", "find_codes", "open_checkpoint"]


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
        plan: weights whose rounding waits for codes are concerned.
        folder: an empty folder for the codes, until the plan has been carried out.
        calibration: the text.
        method: how codes are chosen.
        progress: its stage ``calibrate`` advances.
        batches: what the model is called with, where the text was cut into tokens before.
        even: see :class:`~qwodel.modeling.observe.gram.GramSums`.
        prepare: is given the model before it runs, to hook what its reader does with inputs.

    Returns:
        the plan with the place of its codes filled in, and how each layer's were found.

    Raises:
        CalibrationError: the text is missing or too little.
        ConfigurationError: transformers does not know the architecture.
        DependencyError: transformers or the tokenizer's package is missing.
        ConversionError: the model does not run.
        ValidationError: NaN or Inf among weights or inputs.
        Cancelled: the progress callback raised.
    """
    tasks = {
        each.name.removesuffix(".weight"): each.format
        for each in plan.tensors
        if each.rounding and each.rounding.waits_for_codes and each.format and each.format.quant_type
    }
    progress.stage("calibrate", "reading the calibration text")
    widest = max(
        each.source.shape[1] for each in plan.tensors if each.rounding and each.rounding.waits_for_codes
    )
    with plan.checkpoint.open() as reader:
        lazy = _open(plan, reader, torch.device(calibration.device))
        if batches is None:
            batches = list(calibration_batches(plan.source, lazy.model.config, calibration, widest))
        if prepare is not None:
            prepare(lazy.model)

        def solve(
            weights: Sequence[torch.Tensor], task: Codec, statistics: InputStatistics | None
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
    filled = tuple(
        replace(each, rounding=each.rounding.with_codes_in(folder)) if each.rounding else each
        for each in plan.tensors
    )
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
    checkpoint = Checkpoint.alone(Path(folder))
    with (
        StagedOutput(path, overwrite=overwrite) as output,
        checkpoint.open() as reader,
        SourceFiles(reader.files, files_beside(Path(folder))) as files,
        disk_errors(f"collecting statistics for {path}"),
    ):
        progress.stage("calibrate", "reading the calibration text")
        lazy = open_checkpoint(checkpoint, reader, device=calibration.device)
        blocks = ModelBlocks.of(lazy)
        widest = max(
            (each.in_features for each in lazy.model.modules() if isinstance(each, nn.Linear)), default=1
        )
        batches = list(calibration_batches(Path(folder), lazy.model.config, calibration, widest))
        with _explained(lazy, calibration):
            described = collect_blockwise(blocks, batches, output.scratch, progress, gram=gram)
        progress.stage("publish", path.name)
        write_statistics(output.path, kept_statistics(described, output.scratch), described)
        output.publish(
            envelope(
                backend="calibrate",
                format="statistics",
                source=source_facts(Path(folder), files.settled()),
                recipe={
                    **json_safe(replace(calibration, dataset=describe_dataset(calibration.dataset))),
                    "gram": gram,
                },
                packages=("torch", "transformers", "safetensors"),
                report={"layers": {entry.layers[0]: entry.count for entry in described}},
            )
        )
    progress.complete(str(path))
    return path


def open_checkpoint(
    checkpoint: Checkpoint,
    reader: UnifiedSafetensorsLoader,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LazyModel:
    """A model directory as a lazy model of the numbers its tensors stand for, codes decoded.

    Args:
        checkpoint: a model directory.
        reader: its open files, which must stay open.
        dtype: to compute in; fp32 where most tensors are, else bf16.
        device: where loaded parts live.

    Raises:
        ValidationError: it has no configuration.
        ConfigurationError: transformers does not know the architecture.
    """
    config = described(checkpoint.config, checkpoint.path)
    tensors = {each.name: each for each in checkpoint.sources.tensors}

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
    except (MemoryError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        if what := exhausted(error):
            raise ResourceError(
                f"{what} while {type(lazy.model).__name__} ran block by block",
                hint="pass a smaller batch_size or seq_length, or use a machine with more memory",
            ) from error
        raise ConversionError(
            f"{type(lazy.model).__name__} does not run block by block: {error}",
            hint="run it yourself with qwodel.modeling.collect_statistics and pass the file",
        ) from error


def _open(plan: Plan, reader: UnifiedSafetensorsLoader, device: torch.device) -> LazyModel:
    tensors = {each.name: each for each in plan.tensors}

    def read(name: str) -> torch.Tensor:
        tensor = tensors[name]
        shape = tensor.source.shape
        return weight_rows(reader, tensor, 0, shape[0]) if shape else weight_rows(reader, tensor, 0, 1)[0]

    config = described(plan.checkpoint.config, plan.source)
    return open_lazily(config, tensors, read, dtype=_compute_dtype(plan), device=device)


def _compute_dtype(plan: Plan) -> torch.dtype:
    """fp32 for a source in fp32; else bf16, which has the range that fp16 lacks."""
    wide = sum(each.output_bytes for each in plan.tensors if each.source.dtype in ("F32", "F64"))
    narrow = sum(each.output_bytes for each in plan.tensors if each.source.dtype not in ("F32", "F64"))
    return torch.float32 if wide > narrow else torch.bfloat16
