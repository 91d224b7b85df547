"""A diffusers model or pipeline: loaded, its denoiser quantized, written, and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from qwodel.checkpoint.files.dtypes import torch_dtype
from qwodel.exceptions import CalibrationError, ConversionError, IntegrityError, ValidationError
from qwodel.process_state import MODEL_BUILDING
from qwodel.report import decibels
from qwodel.segquant.batches import Call, calls_of, run_call, tensors_of
from qwodel.segquant.calibration_files import read_meta
from qwodel.segquant.calibration_set import load_calibrate_set
from qwodel.segquant.config import Configuration
from qwodel.segquant.quantization import quantize_model
from qwodel.segquant.recording import generate_calibrate_set
from qwodel.segquant.report import QuantizationReport
from qwodel.segquant.samplers import UniformSampler
from qwodel.segquant.storage import load_quantized, save_quantized
from qwodel.side_files import copy_side_files, side_files
from qwodel.source import ModelSource

__all__ = ["Denoiser"]

_TOLERANCE = 1e-5
"""Relative change of outputs that another order of sums explains."""


@dataclass(eq=False)
class Denoiser:
    """The model that is quantized, and the pipeline it is part of, if any.

    Attributes:
        folder: the model's folder within the pipeline's directory; empty without a pipeline.
    """

    source: ModelSource
    model: nn.Module
    pipeline: Any
    folder: str
    _probe: Call | None = None
    _expected: torch.Tensor | None = None

    @classmethod
    def load(cls, source: ModelSource) -> Self:
        """Load a diffusers directory in its own dtype.

        Raises:
            ValidationError: diffusers has no such model.
            ConversionError: diffusers cannot load it.
        """
        import diffusers

        dtype = torch_dtype(next(iter(source.dtypes))) if source.dtypes else torch.float32
        name = str(source.config["_class_name"])
        kind = getattr(diffusers, name, None)
        if kind is None:
            raise ValidationError(f"diffusers {diffusers.__version__} has no {name}", hint="update diffusers")
        whole = source.input_format == "diffusers"
        loader = diffusers.DiffusionPipeline if whole else kind
        try:
            with MODEL_BUILDING:
                found = loader.from_pretrained(source.path, dtype=dtype, local_files_only=True)
        except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
            raise ConversionError(f"diffusers cannot load {source.path}: {error}") from error
        if not whole:
            return cls(source, found.eval(), None, "")
        found.set_progress_bar_config(disable=True)
        folder = source.weight_files[0].parent.name
        return cls(source, getattr(found, folder).eval(), found, folder)

    def stored_calls(self, folder: Path, batch_size: int) -> list[Call]:
        """The calls of a calibration set.

        Raises:
            CalibrationError: there is none in the folder, or it is not complete.
        """
        meta = read_meta(folder)
        if meta is None:
            raise CalibrationError(f"{folder} is no calibration set")
        found = load_calibrate_set(folder, compress=meta.compress)
        if found is None or not len(found):
            raise CalibrationError(f"the calibration set in {folder} is empty")
        return calls_of(found.dataloader(batch_size))

    def sampled_calls(
        self,
        inputs: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        *,
        kept: int,
        seed: int,
        batch_size: int,
    ) -> list[Call]:
        """Run the pipeline, and keep some calls of the denoiser from each run.

        Raises:
            CalibrationError: the denoiser is never called.
        """
        sampler = UniformSampler(timestep_per_sample=kept, seed=seed)
        found = generate_calibrate_set(self.pipeline, sampler, inputs, self.model, **arguments)
        return calls_of(found.dataloader(batch_size))

    def quantize(
        self,
        calls: Sequence[Call],
        settings: Configuration,
        *,
        per_layer_mode: bool,
        on_layer: Callable[[int, int, str], None],
    ) -> dict[str, Any]:
        """Quantize the model in place; return what a manifest says of it."""
        self._probe = calls[-1]
        exact = self._outputs(self.model)
        report = quantize_model(self.model, calls, settings, per_layer_mode=per_layer_mode, on_layer=on_layer)
        self._expected = self._outputs(self.model)
        error = float((self._expected - exact).square().sum() / exact.square().sum().clamp_min(1e-30))
        return _described(report) | {"outputs_sqnr": round(decibels(1.0, max(error, 1e-30)), 2)}

    def save(self, path: Path, *, max_shard_size: int) -> float:
        """Write the model, or the pipeline with it, and all side files; return the bits a weight takes."""
        target = path / self.folder
        target.mkdir(parents=True)
        replaced = {file for pattern in _WEIGHTS for file in (self.source.path / self.folder).glob(pattern)}
        copy_side_files(side_files(self.source.path, pipeline=bool(self.folder), quantized=replaced), path)
        save_quantized(self.model, target, max_shard_size=max_shard_size)
        stored = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        return round(stored * 8 / max(self.source.parameters, 1), 3)

    def read_back(self, path: Path) -> None:
        """Open what was written as users will; compare every tensor, and the outputs.

        Raises:
            IntegrityError: something differs.
        """
        found = load_quantized(path)
        loaded = getattr(found, self.folder) if self.folder else found
        stored, meant = loaded.state_dict(), self.model.state_dict()
        names = stored.keys() | meant.keys()
        different = sorted(name for name in names if not _alike(stored.get(name), meant.get(name)))
        if different:
            raise IntegrityError(f"read back, {len(different)} tensors differ, {different[0]} among them")
        assert self._expected is not None
        outputs = self._outputs(loaded)
        change = float((outputs - self._expected).norm() / self._expected.norm().clamp_min(1e-30))
        if not change <= _TOLERANCE:
            raise IntegrityError(f"read back, the outputs differ by {change:.2g} (bound {_TOLERANCE:g})")

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> torch.Tensor:
        assert self._probe is not None
        return torch.cat([each.double().flatten() for each in tensors_of(run_call(model, self._probe))])


_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def _described(report: QuantizationReport) -> dict[str, Any]:
    worst = min(report.layers, key=lambda each: each.sqnr)
    return {
        "layers": {each.name: {"sqnr": round(each.sqnr, 2), "how": each.how} for each in report.layers},
        "kept": dict(report.kept),
        "folded": list(report.folded),
        "seams": 0 if report.patterns is None else len(report.patterns.findings),
        "quality": {
            "mean_sqnr": round(sum(each.sqnr for each in report.layers) / len(report.layers), 2),
            "worst": {"name": worst.name, "sqnr": round(worst.sqnr, 2)},
        },
    }


def _alike(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if first is None or second is None or (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    one, other = (each.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for each in (first, second))
    return torch.equal(one, other)
