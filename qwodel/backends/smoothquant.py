"""The SmoothQuant backend: W8A8 model directories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from qwodel.backends.base import BackendOptions, BaseQuantizer, FormatSpec, Job
from qwodel.calibration.options import CalibrationBatches, renamed
from qwodel.checkpoint.plan.recipe import DEFAULT_SHARD_SIZE
from qwodel.exceptions import ConfigurationError, ValidationError
from qwodel.output import require_space
from qwodel.source import ModelSource

if TYPE_CHECKING:
    from qwodel.smoothquant.export_options import ExportOptions

__all__ = ["SmoothQuantOptions", "SmoothQuantQuantizer"]

_FORMATS = (
    FormatSpec(
        "w8a8_dynamic",
        "INT8 weights with a scale a row, inputs rounded token by token: the accurate W8A8",
        8.0,
        "vLLM, transformers, qwodel",
        aliases=("w8a8", "dynamic"),
    ),
    FormatSpec(
        "w8a8_static",
        "INT8 weights with a scale a row, inputs with one calibrated scale a layer: less accurate, less work a token",
        8.0,
        "vLLM, transformers, qwodel",
        needs=("calibration text",),
        aliases=("static",),
    ),
)


class SmoothQuantOptions(CalibrationBatches, BackendOptions):
    """What a SmoothQuant run can be told."""

    alpha: float | Literal["search"] = Field(
        "search",
        description="Share of the activations' difficulty that weights take over, 0 to 1; search finds it layer by layer.",
    )
    inner_alpha: float | Literal["search"] | None = Field(
        None,
        description="The same between up and down, value and output projections; searched where alpha is, else left alone.",
    )
    rotations: Literal["none", "folded", "all"] = Field(
        "folded",
        description="folded: a search may rotate value heads, which any reader loads; all: rotate the inputs of all "
        "layers, more accurate, and only qwodel reads it; none.",
    )
    optimizer: Literal["none", "gptq"] = Field(
        "none", description="How weights are rounded: to nearest, or by GPTQ on the calibration text."
    )
    act_scales: str | None = Field(
        None, description="Activation scales made before (.pt or .safetensors), where alpha is a number."
    )
    max_shard_size: int = Field(DEFAULT_SHARD_SIZE, gt=0, description="Bytes a shard.")


class SmoothQuantQuantizer(BaseQuantizer[SmoothQuantOptions]):
    """A full-precision model directory in, a W8A8 one out."""

    name: ClassVar[str] = "smoothquant"
    extra: ClassVar[str] = "smoothquant"
    accepts: ClassVar[frozenset[str]] = frozenset({"huggingface"})
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "compressed-tensors", "safetensors")
    stages: ClassVar[Mapping[str, float]] = {
        "resolve": 1,
        "calibrate": 80,
        "quantize": 8,
        "verify": 10,
        "publish": 1,
    }
    options_type = SmoothQuantOptions

    @classmethod
    def formats(cls) -> Mapping[str, FormatSpec]:
        """W8A8 formats, by name."""
        return MappingProxyType({spec.name: spec for spec in _FORMATS})

    @classmethod
    def parse_options(
        cls, given: Mapping[str, Any], base: SmoothQuantOptions | None = None
    ) -> SmoothQuantOptions:
        """Validate options, the calibration options' other spellings among them."""
        return super().parse_options(renamed(given), base)

    def output_name(self, source: ModelSource, spec: FormatSpec, options: SmoothQuantOptions) -> str:
        """``<model>-<format>``, with ``-rotated`` where all rotations are on; a directory."""
        return f"{source.name}-{spec.name}{'-rotated' if options.rotations == 'all' else ''}"

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse a model that is quantized already, with ValidationError."""
        if config.get("quantization_config"):
            raise ValidationError(
                "the model is quantized already",
                hint="start from the original weights; a second quantization loses twice",
            )

    def check(self, source: ModelSource, spec: FormatSpec, options: SmoothQuantOptions) -> None:
        """Refuse options that do not suit one another or the model.

        Raises:
            ValidationError: a model that is quantized already.
            ConfigurationError: a bad or unusable option.
        """
        self.check_config(source.config)
        for option, value in (("alpha", options.alpha), ("inner_alpha", options.inner_alpha)):
            if isinstance(value, float) and not 0 <= value <= 1:
                raise ConfigurationError(f"{option} lies in [0, 1], not {value}")
        options.refuse_settings_without_text()
        if (
            options.rotations == "folded"
            and "rotations" in options.model_fields_set
            and not _searches(options)
        ):
            raise ConfigurationError(
                "rotations='folded' is a choice of the search, and alpha is given",
                hint="pass inner_alpha='search', or rotations='none'",
            )
        _export_options(spec, options)

    def run(self, job: Job[SmoothQuantOptions]) -> None:
        """Smooth, round, write a directory of compressed-tensors, and read it back."""
        from qwodel.smoothquant.export import export_w8a8, report_of

        # The smoothed weights lie beside the result, those to quantize in fp32.
        require_space(job.output.scratch, 3 * job.source.weight_bytes, f"making {job.output.final.name}")
        exported = export_w8a8(
            job.source,
            job.output.path,
            job.output.scratch,
            _export_options(job.format, job.options),
            job.progress,
        )
        bits = exported.done.plan.weight_bytes * 8 / max(job.source.parameters, 1)
        job.report |= {"bits_per_weight": round(bits, 3), **report_of(exported)}
        job.report["read_by"] = "qwodel" if job.options.rotations == "all" else job.format.read_by
        self.log.info("relative errors of logits: %s", dict(exported.logits))


def _searches(options: SmoothQuantOptions) -> bool:
    return "search" in (options.alpha, options.inner_alpha)


def _export_options(spec: FormatSpec, options: SmoothQuantOptions) -> ExportOptions:
    from qwodel.smoothquant.export_options import ExportOptions

    return ExportOptions(
        activations="static" if spec.name == "w8a8_static" else "dynamic",
        alpha=options.alpha,
        inner_alpha=options.inner_alpha,
        rotations=options.rotations,
        gptq=options.optimizer == "gptq",
        calibration=options.calibration(token=options.token),
        act_scales=Path(options.act_scales) if options.act_scales else None,
        max_shard_size=options.max_shard_size,
    )
