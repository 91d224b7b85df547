"""The SegQuant backend: diffusers models and pipelines with a quantized denoiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from qwodel.backends.base import BackendOptions, BaseQuantizer, FormatSpec, Job
from qwodel.calibration.options import Dataset
from qwodel.exceptions import CalibrationError, ConfigurationError, ValidationError
from qwodel.output import require_space, size_of
from qwodel.source import ModelSource
from qwodel.untrusted import checked_path, kind_of, parse_json, read_json_object, read_regular

if TYPE_CHECKING:
    from qwodel.segquant.batches import Call
    from qwodel.segquant.config import Configuration
    from qwodel.segquant.export import Denoiser

__all__ = ["SegQuantOptions", "SegQuantQuantizer"]

_STATIC = {"axis": None}
_TOKEN = {"axis": -1, "dynamic": True}
_INT8_ROWS = {"type": "int8", "axis": 1}
_INT4_ROWS = {"type": "int4", "axis": 1}
_ROUNDING: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "w8a8_dynamic": ({"type": "int8", **_TOKEN}, _INT8_ROWS),
    "w8a8_static": ({"type": "int8", **_STATIC}, _INT8_ROWS),
    "w4a8": ({"type": "int8", **_TOKEN}, _INT4_ROWS),
    "fp8": ({"type": "fpe4m3", "dynamic": True}, {"type": "fpe4m3", "axis": 1}),
    "w8a16": ({"type": "bf16"}, _INT8_ROWS),
    "w4a16": ({"type": "bf16"}, _INT4_ROWS),
}
"""Format → what inputs and weights are rounded to."""

_FORMATS = (
    FormatSpec("w8a8_dynamic", "INT8 weights with a scale a row, inputs rounded token by token", 8.0, "qwodel", aliases=("w8a8", "int8")),
    FormatSpec("w8a8_static", "INT8 weights with a scale a row, inputs with calibrated scales for each segment", 8.0, "qwodel"),
    FormatSpec("w4a8", "INT4 weights with a scale a row, INT8 inputs token by token", 4.0, "qwodel"),
    FormatSpec("fp8", "FP8 E4M3 weights with a scale a row, FP8 inputs", 8.0, "qwodel", aliases=("fp8_e4m3",)),
    FormatSpec("w8a16", "INT8 weights with a scale a row, inputs in bfloat16", 8.0, "qwodel"),
    FormatSpec("w4a16", "INT4 weights with a scale a row, inputs in bfloat16", 4.0, "qwodel", aliases=("int4",)),
)  # fmt: skip


class SegQuantOptions(BackendOptions):
    """What a SegQuant run can be told."""

    calibration_set: str | None = Field(
        None, description="Directory of a calibration set, made by qwodel.segquant.generate_calibrate_set."
    )
    calibration_inputs: Dataset | None = Field(
        None,
        description="Instead of a set, what to run the pipeline on: a .txt file with a prompt a line, a .jsonl file "
        "with a call's keyword arguments a line, or in Python a list of either.",
    )
    pipeline_arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="Of calibration_inputs: keyword arguments of every call, such as num_inference_steps.",
    )
    timesteps_per_sample: int = Field(
        5, ge=1, description="Of calibration_inputs: calls of the denoiser kept from each sampling run."
    )
    seed: int = Field(0, description="Of calibration_inputs: seed of the first sampling run.")
    batch_size: int = Field(1, ge=1, description="Recorded calls that are run together.")
    optimum: Literal["default", "smooth", "svd"] = Field(
        "svd",
        description="What is done about outliers: nothing, smoothing, or smoothing and a low-rank branch.",
    )
    alpha: float | Literal["search"] = Field(
        "search", description="Share of the inputs' difficulty that weights take over, 0 to 1, or search."
    )
    low_rank: int = Field(
        32, ge=1, description="Rank of the branch; at most a quarter of a layer's smaller side."
    )
    calibrate: Literal["amax", "gptq"] = Field(
        "gptq", description="How weights are rounded: to nearest, or by GPTQ."
    )
    search_range: bool = Field(
        True, description="Look for scales that may clip; else only for the greatest values."
    )
    seglinear: bool = Field(True, description="Cut layers along the seams of the graph.")
    conv: bool = Field(False, description="Quantize convolutions too.")
    skip: list[str] = Field(default_factory=list, description="Name patterns of layers to leave as they are.")
    config: Any = Field(
        None,
        description="A whole configuration (a dictionary or a .json file), in place of the format's and the above.",
    )
    per_layer_mode: bool = Field(
        False,
        description="Hold the inputs of one layer at a time, and run the model once for each: slower, less memory.",
    )
    max_shard_size: int = Field(10_000_000_000, gt=0, description="Bytes a shard.")


class SegQuantQuantizer(BaseQuantizer[SegQuantOptions]):
    """A diffusers model or pipeline in, the same with quantized layers out."""

    name: ClassVar[str] = "segquant"
    extra: ClassVar[str] = "segquant"
    accepts: ClassVar[frozenset[str]] = frozenset({"huggingface", "diffusers"})
    packages: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "safetensors")
    stages: ClassVar[Mapping[str, float]] = {
        "resolve": 1,
        "calibrate": 20,
        "quantize": 70,
        "verify": 8,
        "publish": 1,
    }
    options_type = SegQuantOptions

    @classmethod
    def formats(cls) -> Mapping[str, FormatSpec]:
        """SegQuant's formats, by name."""
        return MappingProxyType({spec.name: spec for spec in _FORMATS})

    def output_name(self, source: ModelSource, spec: FormatSpec, options: SegQuantOptions) -> str:
        """``<model>-<format>``, a directory."""
        return f"{source.name}-{spec.name}"

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse a model that is quantized already, with ValidationError."""
        if config.get("quantization_config"):
            raise ValidationError(
                "the model is quantized already",
                hint="start from the original weights; a second quantization loses twice",
            )

    def check(self, source: ModelSource, spec: FormatSpec, options: SegQuantOptions) -> None:
        """Refuse what is no diffusers model, and options that do not suit it.

        Raises:
            ValidationError: no model or pipeline of diffusers.
            ConfigurationError: a bad or unusable option.
        """
        if not source.config.get("_class_name"):
            raise ValidationError(
                f"{source.given} is no model or pipeline of diffusers (its config.json names no _class_name)",
                hint="the smoothquant, awq and int8 backends take language models",
            )
        self.check_config(source.config)
        if isinstance(options.alpha, float) and not 0 <= options.alpha <= 1:
            raise ConfigurationError(f"alpha lies in [0, 1], not {options.alpha}")
        given = options.model_fields_set
        if options.config is not None:
            parts = {
                "optimum",
                "alpha",
                "low_rank",
                "calibrate",
                "search_range",
                "seglinear",
                "conv",
                "skip",
            } & given
            if parts:
                raise ConfigurationError(
                    f"{', '.join(sorted(parts))} would be settings of config, which is given"
                )
        if options.optimum != "svd" and "low_rank" in given:
            raise ConfigurationError(f"low_rank belongs to optimum svd, and it is {options.optimum}")
        if options.optimum == "default" and "alpha" in given:
            raise ConfigurationError("alpha belongs to optimum smooth and svd, and it is default")
        self._check_calibration(source, options)
        configuration(spec, options)

    def _check_calibration(self, source: ModelSource, options: SegQuantOptions) -> None:
        if (options.calibration_set is None) == (options.calibration_inputs is None):
            raise CalibrationError(
                "SegQuant needs calibration data: a calibration_set, or calibration_inputs to make one",
                hint="give one of the two",
            )
        if options.calibration_set is not None:
            given = {"pipeline_arguments", "timesteps_per_sample", "seed"} & options.model_fields_set
            if given:
                raise ConfigurationError(
                    f"{', '.join(sorted(given))} belong to calibration_inputs, which are not given"
                )
            folder = checked_path(options.calibration_set, error=CalibrationError)
            if kind_of(folder / "meta.json", error=CalibrationError) != "file":
                raise CalibrationError(
                    f"{options.calibration_set} is no calibration set (it has no meta.json)",
                    hint="make one with qwodel.segquant.generate_calibrate_set",
                )
        elif source.input_format != "diffusers":
            raise CalibrationError(
                f"{source.given} is a model without a pipeline to run on calibration_inputs",
                hint="give the pipeline's directory, or a calibration_set",
            )
        else:
            sampling_inputs(options.calibration_inputs)

    def run(self, job: Job[SegQuantOptions]) -> None:
        """Record the denoiser's inputs, quantize layer by layer, save, and read back."""
        from qwodel.segquant.export import Denoiser

        require_space(job.output.scratch, size_of(job.source.path), f"making {job.output.final.name}")
        options, progress = job.options, job.progress
        progress.stage("calibrate", "loading the model")
        denoiser = Denoiser.load(job.source)
        calls = self._calls(job, denoiser)
        job.report["calibration"] = {"batches": len(calls)}
        progress.stage("quantize", "looking for seams")
        job.report |= denoiser.quantize(
            calls,
            configuration(job.format, options),
            per_layer_mode=options.per_layer_mode,
            on_layer=lambda done, total, name: progress.update(done, total, name),
        )
        progress.update(1, 1, "writing")
        job.report["bits_per_weight"] = denoiser.save(job.output.path, max_shard_size=options.max_shard_size)
        job.output.written()
        progress.stage("verify", "reading the files back")
        denoiser.read_back(job.output.path)

    def _calls(self, job: Job[SegQuantOptions], denoiser: Denoiser) -> list[Call]:
        options = job.options
        if options.calibration_set is not None:
            return denoiser.stored_calls(Path(options.calibration_set), options.batch_size)
        inputs = sampling_inputs(options.calibration_inputs)
        job.progress.update(1, 10, f"{len(inputs)} sampling runs")
        return denoiser.sampled_calls(
            inputs,
            options.pipeline_arguments,
            kept=options.timesteps_per_sample,
            seed=options.seed,
            batch_size=options.batch_size,
        )


def configuration(spec: FormatSpec, options: SegQuantOptions) -> Configuration:
    """The settings of a format and options, checked.

    Raises:
        ConfigurationError: a setting is unknown or cannot be.
    """
    from qwodel.segquant.config import Configuration

    if options.config is not None:
        return Configuration(_read_config(options.config))
    inputs, weights = _ROUNDING[spec.name]
    opt: dict[str, Any] = {"type": options.optimum}
    if options.optimum != "default":
        search: dict[str, Any] = {"search_alpha_config": {}}
        opt |= search if options.alpha == "search" else {"alpha": options.alpha}
    if options.optimum == "svd":
        opt["low_rank"] = options.low_rank
    default = {
        "seglinear": options.seglinear,
        "real_quant": True,
        "conv": options.conv,
        "opt": opt,
        "calib": {"type": options.calibrate, "search_range": options.search_range},
        "input_quant": inputs,
        "weight_quant": weights,
    }
    return Configuration({**{pattern: {"enable": False} for pattern in options.skip}, "default": default})


def _read_config(given: Any) -> Any:
    if isinstance(given, Mapping):
        return given
    try:
        return read_json_object(given)
    except ValidationError as error:
        raise ConfigurationError(f"config {given!r:.300} is no readable JSON file: {error}") from error


def sampling_inputs(given: Any) -> list[dict[str, Any]]:
    """Keyword arguments of each sampling run.

    Raises:
        CalibrationError: a file is unreadable, or there is nothing in it.
    """
    items: Iterable[Any] = given
    if isinstance(given, str | Path):
        path = checked_path(given, error=CalibrationError)
        items = _input_lines(path)
    found = [{"prompt": each} if isinstance(each, str) else each for each in items]
    if not found or not all(isinstance(each, Mapping) for each in found):
        raise CalibrationError(
            "calibration_inputs hold no inputs of the pipeline",
            hint="give prompts, or dictionaries of keyword arguments",
        )
    return [dict(each) for each in found]


def _input_lines(path: Path) -> list[Any]:
    where = f"calibration_inputs {path}"
    try:
        text = read_regular(path).decode("utf-8")
    except (UnicodeDecodeError, ValidationError) as error:
        raise CalibrationError(f"{where} are not readable: {error}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return lines
    return [parse_json(line, where, error=CalibrationError) for line in lines]
