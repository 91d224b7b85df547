"""From a full-precision model directory to a W8A8 one that has been loaded back and compared."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from qwodel.algorithms.data_aware import DataAware
from qwodel.algorithms.hadamard import MAX_CONVROT_GROUP, convrot_weight
from qwodel.checkpoint.convert import convert
from qwodel.checkpoint.decisions import Action
from qwodel.checkpoint.model_directory import ModelDirectory
from qwodel.checkpoint.pipeline import executor_for, make_executor
from qwodel.checkpoint.plan import Plan, build_plan
from qwodel.checkpoint.recipe import DEFAULT_SHARD_SIZE, Recipe
from qwodel.checkpoint.rounding import FromStatistics, Nearest, Rounding
from qwodel.checkpoint.storage_format import storage_format
from qwodel.checkpoint.transformers_layout import TransformersLayout, config_bytes
from qwodel.checkpoint.verify import LayerQuality, verify
from qwodel.exceptions import (
    CalibrationError,
    ConfigurationError,
    ConversionError,
    ValidationError,
)
from qwodel.modeling.calibrated import CalibrationOptions, calibration_batches
from qwodel.modeling.collect import collect_statistics
from qwodel.modeling.lazy_model import config_of
from qwodel.modules.int8_linear import Activations
from qwodel.progress import Progress
from qwodel.smoothquant.calibration import calibrate, load_activation_scales
from qwodel.smoothquant.int8_loading import checkpoint_dtype, quantization_config
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
from qwodel.smoothquant.smooth import Alpha, Smoothed, smooth_model

__all__ = ["ExportOptions", "Exported", "Rotations", "export_w8a8", "report_of"]

log = logging.getLogger(__name__)

Rotations = Literal["none", "folded", "all"]
_SAMPLED_TOKENS = 256
_INT8_MAX = 127


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How a model becomes W8A8.

    Attributes:
        activations: a scale a token (``dynamic``), or one a layer from calibration (``static``).
        alpha, inner_alpha: see :func:`~qwodel.smoothquant.smooth.smooth_model`.
        rotations: ``folded`` may rotate value heads, which is exact and changes no reader; ``all``
            rotates the inputs of all layers, which only :class:`Int8ForCausalLM` computes.
        gptq: round weights by GPTQ.
        calibration: text to run the model on.
        act_scales: a file of activation scales, instead of text where α is a number.
        max_shard_size: bytes a shard.
    """

    activations: Literal["dynamic", "static"] = "dynamic"
    alpha: Alpha = "search"
    inner_alpha: Alpha | None = None
    rotations: Rotations = "folded"
    gptq: bool = False
    calibration: CalibrationOptions | None = None
    act_scales: Path | None = None
    max_shard_size: int = DEFAULT_SHARD_SIZE

    def __post_init__(self) -> None:
        if self.rotations not in ("none", "folded", "all"):
            raise ConfigurationError(f"rotations are 'none', 'folded' or 'all', not {self.rotations!r}")
        searches = "search" in (self.alpha, self.inner_alpha)
        reasons = {
            "a search of α": searches,
            "static activations": self.activations == "static",
            "GPTQ": self.gptq,
        }
        needs = [name for name, wanted in reasons.items() if wanted]
        if self.calibration is None and (needs or self.act_scales is None):
            raise CalibrationError(
                f"{needs[0] if needs else 'smoothing'} needs calibration text",
                hint="pass calibration_dataset, a file or a hub dataset"
                + ("" if needs else ", or act_scales, a file of activation scales"),
            )

    @property
    def scheme(self) -> Scheme:
        """What weights and inputs are rounded with."""
        size = MAX_CONVROT_GROUP if self.rotations == "all" else 0
        return Scheme("channel", "tensor" if self.activations == "static" else "token", size)


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: the engine's plan, each layer's quality, the smoothing, and how logits compare.

    Attributes:
        logits: relative errors: ``int8`` of our INT8 model and ``transformers`` of transformers'
            reading against the same arithmetic simulated in fp32; ``float`` of that against the source.
    """

    plan: Plan
    quality: tuple[LayerQuality, ...]
    smoothed: Smoothed
    logits: Mapping[str, float]


def export_w8a8(
    source: Path, target: Path, scratch: Path, options: ExportOptions, progress: Progress
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
    with _without_bars():
        return _export(source, target, scratch, options, progress)


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws bars of its own, amid our progress."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _export(
    source: Path, target: Path, scratch: Path, options: ExportOptions, progress: Progress
) -> Exported:
    config = config_of(source)
    progress.stage("calibrate", "loading the model")
    model = _load(source, config)
    _refuse_conv1d(model)
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
    with _rotated(model, scheme):
        progress.update(2, 3, "watching the smoothed model")
        scales = _input_scales(model, batches) if options.activations == "static" else {}
        rounding: Rounding = Nearest()
        if options.gptq:
            path = collect_statistics(
                model, batches, scratch / "inputs.safetensors", layers=list(quantizable_layers(model))
            )
            rounding = FromStatistics(path, DataAware("gptq"), "gptq")
        smooth_folder = scratch / "smoothed"
        _save(model, source, smooth_folder, config)
        plan = _plan(model, smooth_folder, rounding, scales, options)
        target.mkdir()
        conversion = convert(plan, target, executor=executor_for(torch.device("cpu"), 1), progress=progress)
        quality = verify(conversion, executor=make_executor(1), progress=progress)
        if scheme.rotate_inputs:
            _describe_as_ours(target, plan, scheme)
        expected = simulate_saved(model, target, plan, scheme, scales, config, probe)
    compared = {"float": relative_error(expected["int8"], original)}
    del model
    logits = {**compared, **read_back(target, scheme, probe, expected)}
    return Exported(plan, quality, smoothed, logits)


def _load(source: Path, config: Mapping[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    if config.get("quantization_config"):
        raise ValidationError(
            f"{source.name} is quantized already",
            hint="start from the original weights; a second quantization loses twice",
        )
    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True).eval()
    except MemoryError:
        raise
    except Exception as error:
        # transformers raises what its many model classes raise.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "Unrecognized configuration class" in reason or "does not recognize this architecture" in reason:
            name = next(iter(config.get("architectures") or [config.get("model_type")]))
            raise ValidationError(
                f"unsupported model architecture {name}: it is no causal language model"
            ) from error
        raise ConversionError(f"transformers cannot load {source.name}: {reason}") from error


def _refuse_conv1d(model: nn.Module) -> None:
    if any(type(each).__name__ == "Conv1D" for each in quantizable_layers(model).values()):
        raise ValidationError(
            f"unsupported model architecture {type(model).__name__} for compressed-tensors, which knows no Conv1D",
            hint="smooth it with smooth_lm and save Int8ForCausalLM.from_float(model), which takes Conv1D",
        )


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


@contextmanager
def _rotated(model: nn.Module, scheme: Scheme) -> Iterator[None]:
    """Rotate weights for good, and inputs while the block runs."""
    hooks = []
    for layer in quantizable_layers(model).values():
        size = scheme.rotation(_columns(layer))
        if size and isinstance(layer.weight, nn.Parameter):
            layer.weight.data = convrot_weight(layer.weight.data, size)
            hooks.append(layer.register_forward_pre_hook(partial(_rotate_input, size)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rotate_input(size: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x = args[0]
    return (convrot_weight(x.reshape(-1, x.shape[-1]), size).reshape(x.shape).to(x.dtype), *args[1:])


def _save(model: Any, source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """Write the smoothed model: what will be quantized in fp32, the rest in the source's dtype."""
    dtype, keep = checkpoint_dtype(config), {f"{name}.weight" for name in quantizable_layers(model)}
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    state = {
        name: value if name in keep else value.to(dtype) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
        if not (
            tied and value.data_ptr() == head.weight.data_ptr() and name.startswith(_name_of(model, head))
        )
    }
    model.save_pretrained(folder, state_dict=state)
    for name, path in ModelDirectory.of(source).side_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    shutil.copyfile(source / "config.json", folder / "config.json")


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def _plan(
    model: Any, folder: Path, rounding: Rounding, scales: Mapping[str, float], options: ExportOptions
) -> Plan:
    head = _name_of(model, model.get_output_embeddings()) or "lm_head"
    suited = {f"{name}.weight" for name in quantizable_layers(model)}
    others = [
        f"^{re.escape(name)}$"
        for name, each in model.named_parameters()
        if each.ndim == 2 and name not in suited
    ]
    recipe = Recipe(
        format=storage_format("int8_row"),
        rounding=rounding,
        filters=(),
        exclude_layers="|".join(
            [rf"(^|\.)({re.escape(head)}|lm_head|gate|router|shared_expert_gate)\.weight$", *others]
        ),
        max_shard_size=options.max_shard_size,
    )
    if options.activations == "static":
        layout = TransformersLayout("static", {f"{name}.weight": scale for name, scale in scales.items()})
    else:
        layout = TransformersLayout("dynamic")
    return build_plan(folder, recipe, layout)


def _describe_as_ours(target: Path, plan: Plan, scheme: Scheme) -> None:
    """Other readers would compute without the rotation: let them refuse the directory instead."""
    config = config_of(target)
    activations: Activations = "token" if scheme.activations == "token" else "static"
    shapes = {each.name.removesuffix(".weight"): each.source.shape for each in plan.tensors}
    config["quantization_config"] = quantization_config(
        {name: (activations, scheme.rotation(shapes[name][1]) or 0) for name in quantized_layers(plan)}
    )
    (target / "config.json").write_bytes(config_bytes(config))


def report_of(exported: Exported) -> dict[str, Any]:
    """What a manifest says of it."""
    plan, smoothed = exported.plan, exported.smoothed
    return {
        "tensors": plan.counts(),
        "kept": {each.name: each.reason for each in plan.tensors if each.action is not Action.QUANTIZE},
        "sqnr_db": {each.name: round(each.sqnr_db, 2) for each in exported.quality},
        "quality": [each.as_dict() for each in exported.quality],
        "smoothing": {
            "change": smoothed.change,
            "undone": list(smoothed.undone),
            "pairs": {
                each.producer: {"kind": str(each.kind), "alpha": each.alpha, "rotated": each.rotated}
                for each in smoothed.pairs
            },
        },
        "logits": dict(exported.logits),
        "warnings": list(plan.warnings),
    }
