"""One safetensors file to INT8, with every option of the command-line tools of this kind."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwodel.algorithms.data_aware import RoundingReport
from qwodel.checkpoint.plan.plan import Plan
from qwodel.checkpoint.plan.planning import build_plan
from qwodel.checkpoint.run.carry_out import CarriedOut, carry_out
from qwodel.exceptions import ValidationError
from qwodel.hashes import SourceFiles
from qwodel.int8.recipe import Int8Arguments
from qwodel.output import StagedOutput, disk_errors
from qwodel.report import TensorQuality, envelope, source_facts
from qwodel.side_files import files_beside
from qwodel.untrusted import checked_path, kind_of

__all__ = ["Int8Conversion", "convert_to_int8", "plan_int8"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Int8Conversion:
    """What was published.

    Attributes:
        path: the file.
        quality: every quantized layer as the file decodes.
        below_threshold: names of layers whose SQNR is below ``quality_threshold``.
        warnings: what the user should know of the file.
        fell_back: tensors that the CPU took over as the device's memory ran out.
        rounding: layer → how its codes were found, where statistics were given.
    """

    path: Path
    quality: tuple[TensorQuality, ...]
    below_threshold: tuple[str, ...]
    warnings: tuple[str, ...]
    fell_back: tuple[str, ...] = ()
    rounding: Mapping[str, RoundingReport] = field(default_factory=dict)


def convert_to_int8(
    input_file: str,
    output_file: str,
    comfy_quant: bool,
    filter_flags: dict[str, bool],
    calib_samples: int,
    seed: int,
    fp16: bool = False,
    fallback: str | None = None,
    custom_layers: str | None = None,
    exclude_layers: str | None = None,
    custom_type: str | None = None,
    custom_block_size: int | None = None,
    custom_scaling_mode: str | None = None,
    custom_simple: bool = False,
    custom_heur: bool = False,
    fallback_block_size: int | None = None,
    fallback_simple: bool = False,
    full_precision_matrix_mult: bool = False,
    skip_inefficient_layers: bool = False,
    include_input_scale: bool = False,
    no_learned_rounding: bool = False,
    save_quant_metadata: bool = False,
    layer_config: dict[str, Any] | None = None,
    layer_config_fullmatch: bool = False,
    low_memory: bool = False,
    streaming_mode: str = "balanced",
    streaming_thresholds: dict[str, int | None] | None = None,
    no_memory_limits: bool = False,
    report_quality: bool = False,
    quality_threshold: float = 30.0,
    smoothquant: bool = False,
    smoothquant_alpha: float = 0.5,
    calibration_data_path: str | None = None,
    calibration_lora_path: str | None = None,
    gptq_actorder: bool = False,
    gptq_fast: bool = True,
    gptq_turbo: bool = False,
    quip_actorder: bool = True,
    quip_hadamard: bool = True,
    quip_seed: int | None = None,
    quip_store_transformed: bool = False,
    quip_requant_scheme: str = "tensor",
    quip_requant_tensor_per_row: bool = True,
    quip_checkpointed: bool = False,
    quip_checkpoint_threshold: int = 8192,
    quip_checkpoint_segments: int = 4,
    merge_lora_path: str | None = None,
    merge_lora_paths: list[str] | None = None,
    merge_lora_scale: float = 1.0,
    merge_lora_dampen: bool = True,
    **converter_kwargs: Any,
) -> Int8Conversion:
    """Quantize the weights of one checkpoint to INT8 and write one safetensors file.

    The file is written aside, read back layer by layer and published in one
    rename, replacing ``output_file`` if it exists. Memory follows the largest
    weight, with or without ``low_memory``. Computing is done on the CPU, where streaming
    options have nothing to move, unless ``device`` says otherwise.

    Args:
        input_file: a ``.safetensors`` file, or a directory of shards.
        output_file: the file to write.
        comfy_quant: describe layers as ComfyUI reads them; otherwise the older names.
        filter_flags: names of ``MODEL_FILTERS`` to switch on; with none the family is
            detected from the tensors' names.
        calib_samples: samples to take from calibration data; none are ever invented.
        seed: of everything random.
        fp16: cast every weight to FP16 instead.
        fallback: ``"int8"`` or ``"fp16"`` (or any storage format) for layers that a model
            filter or their shape keeps out.
        custom_layers, custom_type, custom_block_size, custom_scaling_mode, custom_simple,
            custom_heur: layers (by regular expression) with a format of their own; rounded to
            nearest when simple; shapes that do not suit are left to the other rules when heur.
        exclude_layers: regular expression of tensors to leave as they are.
        low_memory: compute on the CPU, whatever ``device`` finds.
        streaming_mode, streaming_thresholds, no_memory_limits: which weights are too large for
            the device; see :class:`~qwodel.devices.StreamingOptions`. The environment's
            ``STREAMING_AGGRESSIVENESS`` picks the mode in place of the default one.
        report_quality: log every layer's SQNR, the worst first.
        quality_threshold: in dB; layers below are warned of.
        merge_lora_path, merge_lora_paths, merge_lora_scale, merge_lora_dampen: merged first;
            the k-th counts 0.9ᵏ when dampened.
        calibration_data_path: activation statistics (``qwodel calibrate`` makes them): codes then have
            the least error of the layers' outputs, by GPTQ unless ``optimizer`` says otherwise.
        gptq_actorder, gptq_fast, gptq_turbo: columns with the largest inputs first; later columns updated
            once a block; the inner loop as a Triton kernel. The last two do not change codes.
        quip_actorder, quip_checkpointed, quip_checkpoint_threshold, quip_checkpoint_segments: the same
            order for QuIP; its inverse factor made in parts for that many inputs: less memory, same codes.
        quip_store_transformed, quip_hadamard, quip_seed: keep codes in the basis of seeded random
            rotations; :func:`~qwodel.int8.read_weights` decodes them, ComfyUI does not.
        quip_requant_scheme, quip_requant_tensor_per_row: ``"tensor"`` with a scale a row, or one in all;
            or ``"block"``: the scales of codes in the original basis.
        **converter_kwargs: ``scaling_mode`` (``"row"``, ``"tensor"``, ``"block"`` or ``"convrot"``),
            ``block_size``, ``optimizer`` and the options of learned rounding; ``workers``;
            ``device`` (``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"auto"``).

    Raises:
        ConfigurationError: an argument is unknown, has a bad value or would have no effect.
        ValidationError: the input is no checkpoint, or a weight holds NaN or Inf.
        IntegrityError: the input is damaged, or the output does not read back.
        ResourceError: the disk is full.
    """
    arguments = Int8Arguments.of(locals())
    target = checked_path(output_file)
    plan = _plan(checked_path(input_file), target, arguments)
    log.info("model family: %s", plan.family)
    source = Path(input_file)
    with (
        StagedOutput(target, overwrite=True) as output,
        SourceFiles(plan.weight_files, files_beside(source) if source.is_dir() else ()) as files,
        disk_errors(f"writing {target.name}"),
    ):
        done = carry_out(
            plan,
            output.path,
            output.scratch,
            device=arguments.device(),
            workers=arguments.workers(),
            streaming=arguments.streaming(),
            written=output.written,
        )
        output.publish(
            envelope(
                backend="int8",
                format=str(plan.recipe.format),
                source=source_facts(source, files.settled()),
                recipe=asdict(arguments),
                packages=("torch", "safetensors"),
                report={"input": str(input_file), **done.report()},
            )
        )
    below = _report(done, quality_threshold, report_quality)
    return Int8Conversion(target, done.quality, below, plan.warnings, done.fell_back, done.rounding)


def plan_int8(*args: Any, **kwargs: Any) -> Plan:
    """Return what :func:`convert_to_int8` would write with the same arguments, without writing anything.

    Its ``table()`` has a line for every tensor with what becomes of it and why; ``output_bytes`` is
    the exact size of the file.

    Raises:
        ConfigurationError: as :func:`convert_to_int8`.
        ValidationError: as :func:`convert_to_int8`, but for NaN and Inf, which only reading weights finds.
    """
    bound = inspect.signature(convert_to_int8).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    return _plan(
        checked_path(given["input_file"]), checked_path(given["output_file"]), Int8Arguments.of(given)
    )


def _plan(source: Path, target: Path, arguments: Int8Arguments) -> Plan:
    kind_of(source)  # before a loop of links is followed
    if source.resolve() == target.resolve():
        raise ValidationError(f"{target} is the input itself", hint="choose another output_file")
    return build_plan(source, arguments.recipe(), arguments.layout())


def _report(done: CarriedOut, threshold: float, every_layer: bool) -> tuple[str, ...]:
    worst_first = done.worst_first()
    for layer in worst_first if every_layer else ():
        log.info("%7.2f dB  %s", layer.sqnr_db, layer.name)
    below = tuple(layer.name for layer in worst_first if layer.sqnr_db < threshold)
    if below:
        log.warning("%d layers are below %.1f dB, the worst %s", len(below), threshold, below[0])
    return below
