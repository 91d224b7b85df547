"""From a full-precision model directory to a W8A8 one that has been loaded back and compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwodel.algorithms.data_aware import DataAware, RoundingReport
from qwodel.checkpoint.files.model_directory import ModelDirectory
from qwodel.checkpoint.formats.registry import storage_format
from qwodel.checkpoint.layouts.transformers import TransformersLayout, config_bytes
from qwodel.checkpoint.plan.plan import Plan
from qwodel.checkpoint.plan.planning import build_plan
from qwodel.checkpoint.plan.recipe import Recipe
from qwodel.checkpoint.rounding.methods import FromStore, Nearest
from qwodel.checkpoint.run.carry_out import CarriedOut, carry_out
from qwodel.checkpoint.source.checkpoint import Checkpoint
from qwodel.modeling.calibrated import find_codes
from qwodel.modeling.calibration_batches import calibration_batches
from qwodel.modeling.lazy_model import described
from qwodel.modeling.observe.layers import is_fused_experts
from qwodel.modules.int8_linear import Activations
from qwodel.process_state import without_bars
from qwodel.progress import Progress
from qwodel.smoothquant.calibration import calibrate, load_activation_scales
from qwodel.smoothquant.export_options import ExportOptions
from qwodel.smoothquant.input_rotation import rotate_inputs, rotated
from qwodel.smoothquant.int8_loading import quantization_config
from qwodel.smoothquant.observe import ActivationStatistics
from qwodel.smoothquant.read_back import (
    logits_of,
    probe_tokens,
    quantized_layers,
    read_back,
    relative_error,
    simulate_saved,
)
from qwodel.smoothquant.scheme import Scheme
from qwodel.smoothquant.simulate import quantizable_layers
from qwodel.smoothquant.smooth import Smoothed, smooth_model
from qwodel.smoothquant.smoothed_checkpoint import load_float, name_of, refuse_conv1d, save_smoothed
from qwodel.smoothquant.stacked_experts import EXPERT_WEIGHTS, stacked_experts
from qwodel.source import ModelSource

__all__ = ["Exported", "export_w8a8", "report_of"]

_SAMPLED_TOKENS = 256
_INT8_MAX = 127


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: the engine's run, the smoothing, and how logits compare.

    Attributes:
        done: the plan and each layer's quality; how GPTQ found codes.
        logits: relative errors: ``int8`` of our INT8 model and ``transformers`` of transformers'
            reading against the same arithmetic simulated in fp32, ``int8_layer`` of our worst layer's outputs
            given the same inputs; ``float`` of the simulation against the source.
    """

    done: CarriedOut
    smoothed: Smoothed
    logits: Mapping[str, float]


def export_w8a8(
    source: ModelSource, target: Path, scratch: Path, options: ExportOptions, progress: Progress
) -> Exported:
    """Smooth, quantize and write a model, load it back, and compare logits.

    The model is held in fp32, and its smoothed weights lie in ``scratch`` meanwhile.

    Args:
        source: a transformers model directory in full precision.
        target: a directory to make; a staging place, as nothing here is atomic.
        scratch: an empty folder on the same disk.

    Raises:
        ValidationError: ``unsupported model architecture …``, or weights that are quantized already.
        CalibrationError: the text is missing or too short, or ``scales not found for layer …``.
        IntegrityError: what was read back differs.
        Cancelled: the progress callback raised.
    """
    with without_bars():
        config = described(source.parsed.config(source.path), source.path)
        return _export(source.path, config, target, scratch, options, progress)


def _export(
    source: Path,
    config: Mapping[str, Any],
    target: Path,
    scratch: Path,
    options: ExportOptions,
    progress: Progress,
) -> Exported:
    progress.stage("calibrate", "loading the model")
    model = load_float(source, config)
    refuse_conv1d(model)
    probe = probe_tokens(model)
    original = logits_of(model, probe)
    batches = _batches(source, model, options)
    statistics = _statistics(model, batches, options)
    progress.update(1, 3, "smoothing")
    scheme = options.scheme
    smoothed = smooth_model(
        model,
        statistics,
        options.alpha,
        inner_alpha=options.inner_alpha,
        head_rotations=options.rotations == "folded",
        scheme=scheme,
    )
    del statistics
    with rotated(model, scheme):
        progress.update(2, 3, "watching the smoothed model")
        scales = _input_scales(model, batches) if options.activations == "static" else {}
        folder = scratch / "smoothed"
        save_smoothed(model, source, folder, config)
    checkpoint = Checkpoint.of(folder, directory=ModelDirectory(folder, config))
    plan = _plan(model, checkpoint, scales, options)
    del model
    plan, reports = _with_codes(plan, scratch / "codes", batches, options, progress)
    done = carry_out(plan, target, scratch, rounding=reports, progress=progress)
    expected = simulate_saved(done, scheme, scales, probe)
    if scheme.rotate_inputs:
        _describe_as_ours(done, scheme)
    rounding = relative_error(expected.logits["int8"], original)
    logits = {"float": rounding, **read_back(target, scheme, probe, expected, rounding)}
    return Exported(done, smoothed, logits)


def _batches(source: Path, model: Any, options: ExportOptions) -> list[Mapping[str, torch.Tensor]]:
    if options.calibration is None:
        return []
    widest = max(_columns(layer) for layer in quantizable_layers(model).values())
    return list(calibration_batches(source, model.config, options.calibration, widest))


def _columns(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[1]


def _statistics(
    model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], options: ExportOptions
) -> ActivationStatistics:
    given = load_activation_scales(options.act_scales) if options.act_scales else None
    if given is not None and "search" not in (options.alpha, options.inner_alpha):
        return ActivationStatistics(given)
    rows = sum(len(batch["input_ids"]) for batch in batches)
    found = calibrate(model, batches, rows, sampled_tokens=_SAMPLED_TOKENS)
    return found if given is None else replace(found, peaks={**found.peaks, **given})


def _input_scales(model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    peaks = calibrate(model, batches, sum(len(batch["input_ids"]) for batch in batches)).peaks
    names = quantizable_layers(model)
    return {name: max(float(peaks[name].amax()) / _INT8_MAX, 1e-12) for name in names if name in peaks}


def _plan(model: Any, smoothed: Checkpoint, scales: Mapping[str, float], options: ExportOptions) -> Plan:
    head = name_of(model, model.get_output_embeddings()) or "lm_head"
    suited = {f"{name}.weight" for name in quantizable_layers(model)}
    others = [
        f"^{re.escape(name)}$"
        for name, each in model.named_parameters()
        if each.ndim == 2 and name not in suited
    ]
    recipe = Recipe(
        format=storage_format("int8_row"),
        rounding=FromStore(smoothed.path, "gptq") if options.gptq else Nearest(),
        filters=(),
        exclude_layers="|".join(
            [rf"(^|\.)({re.escape(head)}|lm_head|gate|router|shared_expert_gate)\.weight$", *others]
        ),
        max_shard_size=options.max_shard_size,
    )
    inputs = {f"{name}.weight": scale for name, scale in scales.items()}
    layout = TransformersLayout(options.activations, inputs, packed_experts=_experts_pack(model))
    return build_plan(smoothed, recipe, layout)


def _experts_pack(model: nn.Module) -> bool:
    """Whether all stacked experts can be INT8, four codes to an int32."""
    taken = stacked_experts(model)
    all_taken = len(taken) == sum(is_fused_experts(module) for module in model.modules())
    return all_taken and not any(
        getattr(experts, name).shape[-1] % 4 for experts in taken.values() for name in EXPERT_WEIGHTS
    )


def _with_codes(
    plan: Plan,
    folder: Path,
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: ExportOptions,
    progress: Progress,
) -> tuple[Plan, dict[str, RoundingReport]]:
    """The plan with the codes that GPTQ finds block by block, each block on what quantized ones give."""
    if not options.gptq:
        return plan, {}
    assert options.calibration is not None
    folder.mkdir()
    return find_codes(
        plan,
        folder,
        options.calibration,
        DataAware("gptq"),
        progress,
        batches=batches,
        prepare=lambda model: rotate_inputs(model, options.scheme),
        even=True,
    )


def _describe_as_ours(done: CarriedOut, scheme: Scheme) -> None:
    """Other readers would compute without the rotation: let them refuse the directory instead."""
    config, plan = dict(done.output.config), done.plan
    activations: Activations = "token" if scheme.activations == "token" else "static"
    shapes = {each.name.removesuffix(".weight"): each.source.shape for each in plan.tensors}
    config["quantization_config"] = quantization_config(
        {
            name: (activations, scheme.rotation(shapes[name][1]) or 0)
            for name in quantized_layers(plan)
            if ".experts." not in name
        }
    )
    (done.output.path / "config.json").write_bytes(config_bytes(config))


def report_of(exported: Exported) -> dict[str, Any]:
    """What a manifest says of it."""
    smoothed = exported.smoothed
    return {
        **exported.done.report(),
        "smoothing": {
            "change": smoothed.change,
            "undone": list(smoothed.undone),
            "pairs": {
                each.producer: {"kind": str(each.kind), "alpha": each.alpha, "rotated": each.rotated}
                for each in smoothed.pairs
            },
        },
        "logits": dict(exported.logits),
    }
