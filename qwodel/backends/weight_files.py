"""What the FP8 and INT8 backends share: options, layouts, and one run of the checkpoint engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from qwodel.algorithms.data_aware import RoundingReport
from qwodel.backends.base import BaseQuantizer, FormatSpec, Job
from qwodel.backends.weight_file_options import WeightFileOptions
from qwodel.backends.weight_file_rounding import data_aware, rounding_of
from qwodel.calibration.options import renamed
from qwodel.checkpoint.formats.codec import Codec
from qwodel.checkpoint.formats.registry import CODECS, storage_format
from qwodel.checkpoint.layouts.comfyui import ComfyUILayout
from qwodel.checkpoint.layouts.layout import Layout
from qwodel.checkpoint.layouts.transformers import TransformersLayout
from qwodel.checkpoint.lora.merge import LoraSource
from qwodel.checkpoint.plan.layer_config import LayerConfig, load_layer_config
from qwodel.checkpoint.plan.plan import Plan
from qwodel.checkpoint.plan.planning import build_plan
from qwodel.checkpoint.plan.recipe import LayerOverride, Recipe
from qwodel.checkpoint.run.carry_out import carry_out
from qwodel.checkpoint.source.checkpoint import Checkpoint
from qwodel.devices import resolve_device
from qwodel.exceptions import ConfigurationError
from qwodel.output import require_space
from qwodel.source import ModelSource

__all__ = ["WeightFileOptions", "WeightFileQuantizer"]

_WORST_LAYERS = 5


class WeightFileQuantizer(BaseQuantizer[WeightFileOptions]):
    """Safetensors in, safetensors with quantized weights out."""

    accepts: ClassVar[frozenset[str]] = frozenset({"huggingface", "pytorch", "safetensors"})
    packages: ClassVar[tuple[str, ...]] = ("torch", "safetensors")
    stages: ClassVar[Mapping[str, float]] = {"resolve": 1, "quantize": 60, "verify": 30, "publish": 2}
    options_type = WeightFileOptions

    @classmethod
    def formats(cls) -> Mapping[str, FormatSpec]:
        """The codecs that name this backend."""
        return MappingProxyType(
            {
                codec.name: FormatSpec(
                    codec.name, codec.description, codec.nominal_bits, codec.read_by, aliases=codec.aliases
                )
                for codec in CODECS.values()
                if codec.backend == cls.name
            }
        )

    @classmethod
    def parse_options(
        cls, given: Mapping[str, Any], base: WeightFileOptions | None = None
    ) -> WeightFileOptions:
        """Validate options, the calibration options' other spellings among them."""
        return super().parse_options(renamed(given), base)

    def output_name(self, source: ModelSource, spec: FormatSpec, options: WeightFileOptions) -> str:
        """``<model>-<format>``: a file or a directory, as the layout has it."""
        suffix = ".safetensors" if _layout(source, spec, options).single_file else ""
        return f"{source.name}-{spec.name}{suffix}"

    def stage_weights(
        self, source: ModelSource, spec: FormatSpec, options: WeightFileOptions
    ) -> Mapping[str, float]:
        """Shares of time: running the model on text outweighs everything else."""
        runs = {"resolve": 1, "calibrate": 85, "quantize": 6, "verify": 6, "publish": 2}
        return self.stages if options.calibration_dataset is None else runs

    def check(self, source: ModelSource, spec: FormatSpec, options: WeightFileOptions) -> None:
        """Refuse what the layout, the format, the rounding or the device cannot do.

        Raises:
            ConfigurationError: an option that does not suit, a device that is not there, or text for a model that cannot be run.
        """
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
        checkpoint = Checkpoint.of(source.path, source.parsed)
        return build_plan(checkpoint, _recipe(spec, options), _layout(source, spec, options))

    def run(self, job: Job[WeightFileOptions]) -> None:
        """Plan, calibrate where there is text, convert tensor by tensor, and read back."""
        plan = self.plan(job.source, job.format, job.options)
        self.log.info("model family: %s", plan.family)
        reports: dict[str, RoundingReport] = {}
        if job.options.calibration_dataset is not None:
            plan, reports = self._calibrated(plan, job)
        device = resolve_device(job.options.device)
        done = carry_out(
            plan,
            job.output.path,
            job.output.scratch,
            device=device,
            workers=job.options.workers,
            rounding=reports,
            written=job.output.written,
            progress=job.progress,
        )
        self._tell(done.rounding)
        bits = plan.weight_bytes * 8 / max(job.source.parameters, 1)
        job.report |= {"bits_per_weight": round(bits, 3), **done.report(), "device": str(device)}

    def _calibrated(self, plan: Plan, job: Job[WeightFileOptions]) -> tuple[Plan, dict[str, RoundingReport]]:
        from qwodel.modeling.calibrated import find_codes

        folder = job.output.scratch / "codes"
        folder.mkdir()
        require_space(folder, plan.weight_bytes, "keeping codes while the model is run")
        text = job.options.calibration(token=job.options.token, device=job.options.device)
        assert text is not None
        return find_codes(plan, folder, text, data_aware(job.options), job.progress)

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


def _layout(source: ModelSource, spec: FormatSpec, options: WeightFileOptions) -> Layout:
    name = options.layout
    wanted = storage_format(spec.name)
    if name == "auto" and (wanted.rotates):
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


def _format(spec: FormatSpec, options: WeightFileOptions) -> Codec:
    return storage_format(spec.name, options.block_size)


def _recipe(spec: FormatSpec, options: WeightFileOptions) -> Recipe:
    if (options.custom_layers is None) != (options.custom_format is None):
        raise ConfigurationError("custom_layers and custom_format go together")
    rounding = rounding_of(options)
    aware = rounding if rounding and rounding.uses_data else None
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
