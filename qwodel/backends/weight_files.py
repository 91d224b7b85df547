"""What the FP8 and INT8 backends share: options, layouts, and one run of the checkpoint engine."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from qwodel.algorithms.converter_options import rounding_options
from qwodel.algorithms.data_aware import DataAware, RoundingReport
from qwodel.algorithms.gptq import GptqOptions
from qwodel.backends.base import BackendOptions, BaseQuantizer, FormatSpec, Job
from qwodel.checkpoint.comfyui import ComfyUILayout
from qwodel.checkpoint.convert import convert
from qwodel.checkpoint.decisions import Action
from qwodel.checkpoint.layer_config import LayerConfig, load_layer_config
from qwodel.checkpoint.layout import Layout
from qwodel.checkpoint.pipeline import executor_for, make_executor
from qwodel.checkpoint.plan import Plan, build_plan
from qwodel.checkpoint.recipe import DEFAULT_SHARD_SIZE, LayerOverride, LoraSource, Recipe
from qwodel.checkpoint.rounding import FromStatistics, FromStore, Learned, Nearest, Rounding, ScaleSearch
from qwodel.checkpoint.statistics import StatisticsFile
from qwodel.checkpoint.storage_format import StorageFormat, storage_format
from qwodel.checkpoint.streaming import resolve_device
from qwodel.checkpoint.transformers_layout import TransformersLayout
from qwodel.checkpoint.verify import LayerQuality, verify
from qwodel.exceptions import ConfigurationError
from qwodel.output import require_space
from qwodel.source import ModelSource

if TYPE_CHECKING:
    from qwodel.modeling.calibrated import CalibrationOptions

__all__ = ["WeightFileOptions", "WeightFileQuantizer"]

log = logging.getLogger(__name__)

LayoutName = Literal["auto", "comfyui", "transformers"]
Optimizer = Literal["auto", "none", "search", "gptq", "quip", "original", "adamw", "radam", "ppsf"]
_LEARNED = ("num_iter", "lr", "lr_schedule", "top_p", "min_k", "max_k", "full_matrix", "seed")
_COLUMNWISE = ("damping", "act_order")
_DATA = ("num_samples", "seq_length", "batch_size", "calibration_split", "text_column")
_WORST_LAYERS = 5


class WeightFileOptions(BackendOptions):
    """What an FP8 or INT8 run can be told."""

    layout: LayoutName = Field(
        "auto", description="comfyui: one file; transformers: a model directory; auto goes by what was given."
    )
    optimizer: Optimizer = Field(
        "auto",
        description="How codes are chosen: none rounds to nearest, search looks for better scales, gptq and quip "
        "make each column's error good in later ones, original, adamw, radam and ppsf learn the rounding; "
        "auto is gptq with calibration data, else none or search by format.",
    )
    calibration_dataset: Any = Field(
        None,
        description="Text to run the model on: a .txt, .json, .jsonl or .parquet file, a folder, a hub dataset "
        "(repo or repo:subset), or in Python any iterable of texts.",
    )
    calibration_data_path: str | None = Field(
        None, description="Statistics collected before, by qwodel calibrate or collect_statistics."
    )
    num_samples: int | None = Field(
        None,
        ge=1,
        description="Calibration: sequences; by default two tokens an input channel, at least 16384.",
    )
    seq_length: int | None = Field(None, ge=1, description="Calibration: tokens a sequence; 512.")
    batch_size: int | None = Field(None, ge=1, description="Calibration: sequences run together; 4.")
    calibration_split: str | None = Field(None, description="Calibration: split of a hub dataset; train.")
    text_column: str | None = Field(None, description="Calibration: the text column; found by its name.")
    token: str | None = Field(None, description="Hugging Face token, for gated data.", repr=False)
    damping: float | None = Field(
        None, gt=0, le=1, description="gptq, quip: share of the mean diagonal added to the Gram matrix; 0.03."
    )
    act_order: bool | None = Field(None, description="gptq, quip: columns with the largest inputs first; on.")
    num_iter: int | None = Field(None, ge=0, description="Learned rounding: the most iterations a matrix.")
    lr: float | None = Field(None, gt=0, description="Learned rounding: the first learning rate.")
    lr_schedule: str | None = Field(None, description="Learned rounding: adaptive, plateau or exponential.")
    top_p: float | None = Field(None, description="Learned rounding: share of singular values looked at.")
    min_k: int | None = Field(None, description="Learned rounding: fewest singular vectors.")
    max_k: int | None = Field(None, description="Learned rounding: most singular vectors.")
    full_matrix: bool | None = Field(None, description="Learned rounding: full SVD.")
    seed: int | None = Field(None, description="Learned rounding: seed of the randomized SVD.")
    block_size: int | None = Field(None, gt=0, description="Side of scale blocks, for block formats; 128.")
    filters: tuple[str, ...] | None = Field(
        None, description="Model filters to apply, such as flux or wan; unset detects the family from names."
    )
    exclude_layers: str | None = Field(
        None, description="Regular expression of tensors to leave as they are."
    )
    custom_layers: str | None = Field(
        None, description="Regular expression of layers that get custom_format, whatever the filters say."
    )
    custom_format: str | None = Field(None, description="Format of custom_layers, such as int8_row or fp16.")
    fallback: str | None = Field(
        None,
        description="Format of layers that the model's filters or their shape keep out; unset keeps them.",
    )
    skip_inefficient_layers: bool = Field(
        False, description="Leave out layers with a side below the block size or not a multiple of it."
    )
    layer_config: str | dict[str, Any] | None = Field(
        None, description="Per-layer rules: a JSON file or its content."
    )
    layer_config_fullmatch: bool = Field(False, description="Rules must match whole layer names.")
    nonfinite: Literal["error", "keep"] = Field(
        "error", description="Weights with NaN or Inf: an error, or kept in their own dtype."
    )
    loras: tuple[str | tuple[str, float], ...] = Field(
        (), description="LoRA files to merge first, each a path or (path, scale)."
    )
    lora_dampen: bool = Field(True, description="Count the k-th LoRA 0.9^k.")
    allow_unmatched_loras: bool = Field(False, description="Skip LoRA layers that fit no weight.")
    activations: Literal["dynamic", "none"] = Field(
        "dynamic", description="transformers layout: whether readers quantize activations token by token."
    )
    full_precision_matrix_mult: bool = Field(
        False, description="comfyui layout: compute with de-quantized weights."
    )
    input_scale: bool = Field(False, description="comfyui layout: write activation scales of 1.0.")
    save_quant_metadata: bool = Field(False, description="comfyui layout: describe layers in the header too.")
    legacy_names: bool = Field(False, description="comfyui layout: scaled_fp8 names instead of descriptions.")
    max_shard_size: int = Field(DEFAULT_SHARD_SIZE, gt=0, description="transformers layout: bytes a shard.")
    workers: int = Field(
        1, ge=1, description="Processes that work on tensors on the CPU; the bytes are the same."
    )
    device: str = Field(
        "cpu",
        description="Where codes are computed: cpu, cuda, cuda:N, or auto for CUDA where there is one.",
    )


class WeightFileQuantizer(BaseQuantizer[WeightFileOptions]):
    """Safetensors in, safetensors with quantized weights out."""

    accepts: ClassVar[frozenset[str]] = frozenset({"huggingface", "safetensors"})
    packages: ClassVar[tuple[str, ...]] = ("torch", "safetensors")
    stages: ClassVar[Mapping[str, float]] = {"resolve": 1, "quantize": 60, "verify": 30, "publish": 2}
    options_type = WeightFileOptions

    def output_name(self, source: ModelSource, spec: FormatSpec, options: WeightFileOptions) -> str:
        suffix = ".safetensors" if _layout(source, spec, options).single_file else ""
        return f"{source.name}-{spec.name}{suffix}"

    def stage_weights(
        self, source: ModelSource, spec: FormatSpec, options: WeightFileOptions
    ) -> Mapping[str, float]:
        runs = {"resolve": 1, "calibrate": 85, "quantize": 6, "verify": 6, "publish": 2}
        return self.stages if options.calibration_dataset is None else runs

    def check(self, source: ModelSource, spec: FormatSpec, options: WeightFileOptions) -> None:
        _layout(source, spec, options).support(_format(spec, options))
        _recipe(spec, options)
        resolve_device(options.device)
        if options.calibration_dataset is not None and not source.config.get("architectures"):
            raise ConfigurationError(
                f"{source.name} has no config.json that names its architecture, so it cannot be run on text",
                hint="collect statistics with qwodel.modeling.collect_statistics and pass calibration_data_path",
            )

    def plan(self, source: ModelSource, spec: FormatSpec, options: WeightFileOptions) -> Plan:
        """Return what a run would do; ``str`` of its ``table()`` is the dry run."""
        return build_plan(source.path, _recipe(spec, options), _layout(source, spec, options))

    def run(self, job: Job[WeightFileOptions]) -> None:
        plan = self.plan(job.source, job.format, job.options)
        self.log.info("model family: %s", plan.family)
        reports: dict[str, RoundingReport] = {}
        if job.options.calibration_dataset is not None:
            plan, reports = self._calibrated(plan, job)
        require_space(job.output.scratch, plan.output_bytes, f"making {job.output.final.name}")
        device, workers = resolve_device(job.options.device), job.options.workers
        if not plan.layout.single_file:
            job.output.path.mkdir()
        conversion = convert(
            plan, job.output.path, executor=executor_for(device, workers), progress=job.progress
        )
        quality = verify(conversion, executor=make_executor(workers), progress=job.progress)
        job.report |= _report(plan, quality, job.source)
        if reports := reports | dict(conversion.reports):
            job.report["rounding"] = {layer: asdict(report) for layer, report in reports.items()}
            self._tell(reports)
        job.report |= {"device": str(device), "fell_back_to_cpu": list(conversion.fell_back)}

    def _calibrated(self, plan: Plan, job: Job[WeightFileOptions]) -> tuple[Plan, dict[str, RoundingReport]]:
        from qwodel.modeling.calibrated import find_codes

        folder = job.output.scratch / "codes"
        folder.mkdir()
        require_space(folder, plan.weight_bytes, "keeping codes while the model is run")
        return find_codes(plan, folder, _calibration(job.options), _data_aware(job.options), job.progress)

    def _tell(self, reports: Mapping[str, RoundingReport]) -> None:
        """Say what the data has won, and where it was not used."""
        gains = [
            report.output_sqnr_db - report.nearest_sqnr_db
            for report in reports.values()
            if report.output_sqnr_db is not None and report.nearest_sqnr_db is not None
        ]
        if gains:
            mean = sum(gains) / len(gains)
            self.log.info(
                "outputs gain %.1f dB over round-to-nearest, the mean of %d layers", mean, len(gains)
            )
        for layer, report in reports.items():
            if report.note:
                self.log.warning("%s is rounded without data: %s", layer, report.note)


def _report(plan: Plan, quality: tuple[LayerQuality, ...], source: ModelSource) -> dict[str, Any]:
    worst = sorted(quality, key=lambda layer: layer.sqnr_db)
    return {
        "bits_per_weight": round(plan.weight_bytes * 8 / max(source.parameters, 1), 3),
        "layout": plan.layout.name,
        "family": {
            "name": plan.family.name,
            "evidence": list(plan.family.evidence),
            "filters": list(plan.family.filters if plan.recipe.filters is None else plan.recipe.filters),
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
        "sqnr_db": {
            layer.name: round(layer.sqnr_db, 2) if math.isfinite(layer.sqnr_db) else None for layer in quality
        },
        "worst_layers": [layer.name for layer in worst[:_WORST_LAYERS]],
        "quality": [layer.as_dict() for layer in quality],
        "warnings": list(plan.warnings),
    }


def _layout(source: ModelSource, spec: FormatSpec, options: WeightFileOptions) -> Layout:
    name = options.layout
    wanted = storage_format(spec.name)
    if name == "auto" and (wanted.convrot or wanted.quip_seed is not None):
        name = "comfyui"  # the one layout that can say how weights are rotated
    if name == "auto":
        # A bare diffusion checkpoint is for ComfyUI; a directory with a model's config is for transformers.
        described = bool(source.config.get("model_type") or source.config.get("architectures"))
        name = "transformers" if source.input_format == "huggingface" and described else "comfyui"
    comfyui = ("full_precision_matrix_mult", "input_scale", "save_quant_metadata", "legacy_names")
    if name == "transformers":
        for option in comfyui:
            if getattr(options, option):
                raise ConfigurationError(
                    f"{option} belongs to the comfyui layout, and this run uses the transformers one",
                    hint="pass layout='comfyui', or drop the option",
                )
        return TransformersLayout(options.activations)
    return ComfyUILayout(
        options.full_precision_matrix_mult,
        options.input_scale,
        options.save_quant_metadata,
        options.legacy_names,
    )


def _format(spec: FormatSpec, options: WeightFileOptions) -> StorageFormat:
    return storage_format(spec.name, options.block_size)


def _recipe(spec: FormatSpec, options: WeightFileOptions) -> Recipe:
    if (options.custom_layers is None) != (options.custom_format is None):
        raise ConfigurationError("custom_layers and custom_format go together")
    rounding = _rounding(options)
    aware = rounding if isinstance(rounding, FromStatistics | FromStore) else None
    custom = None
    if options.custom_layers is not None and options.custom_format is not None:
        custom = LayerOverride(options.custom_layers, storage_format(options.custom_format), aware)
    rules = options.layer_config
    if isinstance(rules, str):
        rules = load_layer_config(rules)
    loras = [(each, 1.0) if isinstance(each, str) else each for each in options.loras]
    return Recipe(
        format=_format(spec, options),
        rounding=rounding,
        fallback_rounding=aware,
        filters=options.filters,
        custom_layers=custom,
        exclude_layers=options.exclude_layers,
        fallback=storage_format(options.fallback) if options.fallback else None,
        skip_inefficient_layers=options.skip_inefficient_layers,
        layer_config=LayerConfig.from_mapping(rules) if rules is not None else None,
        layer_config_fullmatch=options.layer_config_fullmatch,
        nonfinite=options.nonfinite,
        loras=tuple(LoraSource(Path(path), scale) for path, scale in loras),
        dampen_loras=options.lora_dampen,
        allow_unmatched_loras=options.allow_unmatched_loras,
        max_shard_size=options.max_shard_size,
    )


def _rounding(options: WeightFileOptions) -> Rounding | None:
    method = options.optimizer
    data = options.calibration_dataset is not None or options.calibration_data_path is not None
    if method == "auto" and data:
        method = "gptq"
    _check_settings(options, method, data)
    if data:
        aware = _data_aware(options)
        if options.calibration_data_path is not None:
            path = Path(options.calibration_data_path)
            StatisticsFile(path).close()
            return FromStatistics(path, aware, method)
        return FromStore(Path(), method)
    if method in ("gptq", "quip"):
        log.warning("%s has no calibration data to go by: scales are searched and codes rounded", method)
        return None
    simple: dict[str, Rounding | None] = {"auto": None, "none": Nearest(), "search": ScaleSearch()}
    return (
        simple[method] if method in simple else Learned(rounding_options(method, _given(options, _LEARNED)))
    )


def _check_settings(options: WeightFileOptions, method: str, data: bool) -> None:
    """Refuse what would have no effect."""
    if options.calibration_dataset is not None and options.calibration_data_path is not None:
        raise ConfigurationError("give calibration_dataset or calibration_data_path, not both")
    if data and method in ("none", "search"):
        raise ConfigurationError(
            f"optimizer={method!r} makes no use of calibration data", hint="pass optimizer='gptq', or no data"
        )
    learned, columnwise = _given(options, _LEARNED), _given(options, _COLUMNWISE)
    if method not in ("original", "adamw", "radam", "ppsf"):
        learned.pop("seed", None) if data else None
        if learned:
            raise ConfigurationError(
                f"{', '.join(learned)} belong to learned rounding, and optimizer={method!r} does not learn",
                hint="pass optimizer='original', 'adamw', 'radam' or 'ppsf'",
            )
    if columnwise and method not in ("gptq", "quip"):
        raise ConfigurationError(
            f"{', '.join(columnwise)} belong to gptq and quip, not to optimizer={method!r}",
            hint="pass optimizer='gptq'",
        )
    if options.calibration_dataset is None and (given := _given(options, _DATA)):
        raise ConfigurationError(f"{', '.join(given)} belong to calibration_dataset, which is not given")


def _given(options: WeightFileOptions, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _data_aware(options: WeightFileOptions) -> DataAware:
    method = "gptq" if options.optimizer == "auto" else options.optimizer
    columnwise = GptqOptions(**_given(options, _COLUMNWISE))
    if method == "gptq" or method == "quip":
        return DataAware(method, columnwise)
    return DataAware("learned", learned=rounding_options(method, _given(options, _LEARNED)))


def _calibration(options: WeightFileOptions) -> CalibrationOptions:
    from qwodel.modeling.calibrated import CalibrationOptions

    names = {"num_samples", "seq_length", "batch_size", "token", "seed"}
    given = _given(options, tuple(names))
    renamed = {"split": options.calibration_split, "column": options.text_column}
    given |= {name: value for name, value in renamed.items() if value is not None}
    return CalibrationOptions(options.calibration_dataset, device=options.device, **given)
