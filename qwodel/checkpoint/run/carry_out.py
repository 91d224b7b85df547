"""A plan carried out, read back and reported: the one road of every run that writes quantized weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qwodel.algorithms.data_aware import RoundingReport
from qwodel.checkpoint.plan.plan import Plan
from qwodel.checkpoint.run.convert import convert_checkpoint
from qwodel.checkpoint.run.device_executor import executor_for, make_executor
from qwodel.checkpoint.run.verify import read_output, verify
from qwodel.checkpoint.source.checkpoint import Checkpoint
from qwodel.checkpoint.tensors import Action
from qwodel.devices import StreamingOptions
from qwodel.output import require_space
from qwodel.progress import Progress
from qwodel.report import TensorQuality

__all__ = ["CarriedOut", "carry_out"]

_WORST_LAYERS = 5


@dataclass(frozen=True, slots=True)
class CarriedOut:
    """What a run has written and measured.

    Attributes:
        output: what was written, as its files say.
        quality: of every quantized layer, in the source's order, measured on the files.
        rounding: layer → how a data-aware method found its codes.
        fell_back: layers that were worked on again on the CPU, as the device's memory ran out.
    """

    plan: Plan
    output: Checkpoint
    quality: tuple[TensorQuality, ...]
    rounding: Mapping[str, RoundingReport]
    fell_back: tuple[str, ...]

    def worst_first(self) -> list[TensorQuality]:
        """The layers by rising SQNR."""
        return sorted(self.quality, key=lambda layer: layer.sqnr_db)

    def report(self) -> dict[str, Any]:
        """What a manifest says of it."""
        plan = self.plan
        filters = plan.family.filters if plan.recipe.filters is None else plan.recipe.filters
        return {
            "layout": plan.layout.name,
            "family": {
                "name": plan.family.name,
                "evidence": list(plan.family.evidence),
                "filters": list(filters),
            },
            "tensors": plan.counts(),
            "kept": {
                each.name: each.reason
                for each in plan.tensors
                if each.outputs and each.action is not Action.QUANTIZE
            },
            "dropped": {
                **{each.name: each.reason for each in plan.tensors if not each.outputs},
                **plan.dropped,
            },
            "sqnr_db": {layer.name: layer.reported_db for layer in self.quality},
            "worst_layers": [layer.name for layer in self.worst_first()[:_WORST_LAYERS]],
            "quality": [_described(layer) for layer in self.quality],
            "rounding": {layer: asdict(report) for layer, report in self.rounding.items()},
            "fell_back_to_cpu": list(self.fell_back),
            "warnings": list(plan.warnings),
        }


def _described(layer: TensorQuality) -> dict[str, str | float | None]:
    return {
        "name": layer.name,
        "format": layer.format,
        "rounding": layer.rounding,
        "sqnr_db": layer.reported_db,
        "mse": layer.mse,
        "max_error": layer.max_error,
    }


def carry_out(
    plan: Plan,
    destination: Path,
    scratch: Path,
    *,
    device: torch.device | None = None,
    workers: int = 1,
    streaming: StreamingOptions | None = None,
    rounding: Mapping[str, RoundingReport] | None = None,
    written: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> CarriedOut:
    """Write what a plan says to ``destination``, a staging place, and read it back.

    Args:
        scratch: a folder on the same disk, whose room is looked at first.
        device: where codes are computed; the CPU if ``None``.
        workers: processes on the CPU; with 1, threads of this one.
        streaming: what goes to the CPU although a device is there.
        rounding: how codes were found that are there already.
        written: called when every byte is written, before it is read back.

    Raises:
        ResourceError: the disk has no room for it, or memory ran out.
        ValidationError: a weight holds NaN or Inf, or values that a cast cannot hold.
        ConversionError: a method failed on a tensor.
        IntegrityError: what was read back differs.
        Cancelled: the progress callback raised.
    """
    require_space(scratch, plan.output_bytes, f"making {destination.name}")
    if not plan.layout.single_file:
        destination.mkdir()
    executor = executor_for(device or torch.device("cpu"), workers, streaming)
    conversion = convert_checkpoint(plan, destination, executor=executor, progress=progress)
    written()
    output = read_output(plan, destination)
    quality = verify(conversion, written=output, executor=make_executor(workers), progress=progress)
    reports = {**(rounding or {}), **conversion.reports}
    return CarriedOut(plan, output, quality, reports, tuple(conversion.fell_back))
