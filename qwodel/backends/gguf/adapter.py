"""The GGUF backend: Hugging Face directory or ``.gguf`` in, quantized ``.gguf`` out."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from qwodel.backends.base import BaseQuantizer, FormatSpec, Job
from qwodel.backends.gguf import steps
from qwodel.backends.gguf.accounting import dropped_tensors
from qwodel.backends.gguf.answers import LoadedModel
from qwodel.backends.gguf.calibrate import importance_matrix
from qwodel.backends.gguf.formats import file_type, format_specs
from qwodel.backends.gguf.options import GGUFOptions
from qwodel.backends.gguf.toolchain import converter, lock
from qwodel.backends.gguf.verify import (
    check_metadata,
    check_tensors,
    check_tokenization,
    check_tokenizer,
    measure,
)
from qwodel.calibration.options import renamed
from qwodel.exceptions import CalibrationError, ConfigurationError, IntegrityError, ValidationError
from qwodel.gguf_header import GGML_TYPES, GGUFHeader, read_gguf_header
from qwodel.name_patterns import name_pattern
from qwodel.output import require_space
from qwodel.report import TensorQuality
from qwodel.source import ModelSource

__all__ = ["GGUFQuantizer"]

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_VERIFIERS = ("gguf.quants", "tokenizers", "sentencepiece")
_NOISY_DB = 4.0  # below what the one-bit grids give with an importance matrix
_ENCODING_SUFFIX = re.compile(r"[.-](I?Q\d\w*|T?Q\d\w*|MXFP4\w*|BF16|F16|F32)$", re.IGNORECASE)
_SPLIT_SUFFIX = re.compile(r"-\d{5}-of-\d{5}$")


class GGUFQuantizer(BaseQuantizer[GGUFOptions]):
    """llama.cpp: its converter, its quantizer, its loader."""

    name: ClassVar[str] = "gguf"
    extra: ClassVar[str] = "gguf"
    accepts: ClassVar[frozenset[str]] = frozenset({"huggingface", "gguf"})
    packages: ClassVar[tuple[str, ...]] = ("llama-cpp-python", "gguf", "transformers", "torch", "numpy")
    options_type = GGUFOptions

    @classmethod
    def formats(cls) -> Mapping[str, FormatSpec]:
        """llama.cpp's file types, by name."""
        return format_specs()

    @classmethod
    def parse_options(cls, given: Mapping[str, Any], base: GGUFOptions | None = None) -> GGUFOptions:
        """Validate options, the calibration options' other spellings among them."""
        return super().parse_options(renamed(given), base)

    def output_name(self, source: ModelSource, spec: FormatSpec, options: GGUFOptions) -> str:
        """``<model>-<format>.gguf``."""
        return f"{_model_name(source)}-{spec.name}.gguf"

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse an architecture that llama.cpp's converter does not take, with ValidationError."""
        converter().check_architecture(config)

    def check(self, source: ModelSource, spec: FormatSpec, options: GGUFOptions) -> None:
        """Refuse options that contradict one another, and formats without the importance matrix they need.

        Raises:
            ConfigurationError: options that exclude each other, or a missing importance matrix.
            ValidationError: a model llama.cpp does not take.
        """
        if options.imatrix is not None and options.calibration_dataset is not None:
            raise ConfigurationError(
                "imatrix and calibration_dataset exclude each other",
                hint="give the file, or the text to compute it from",
            )
        if (
            "importance matrix" in spec.needs
            and options.imatrix is None
            and options.calibration_dataset is None
        ):
            raise CalibrationError(
                f"{spec.name} needs an importance matrix: without one its output is garbage",
                hint="pass calibration_dataset= a text file or dataset to compute it from, or imatrix= a file",
            )
        if source.input_format == "gguf":
            _check_requantize(source, spec, options)
        else:
            _check_directory(source)

    def stage_weights(
        self, source: ModelSource, spec: FormatSpec, options: GGUFOptions
    ) -> Mapping[str, float]:
        """Shares of time: types that search a grid take ten times as long, and calibration takes long too."""
        # Grid types search; the others round.
        slow = file_type(spec.name).main_type.startswith("IQ")
        weights: dict[str, float] = {"resolve": 1, "quantize": 400 if slow else 30, "verify": 4, "publish": 1}
        if source.input_format != "gguf":
            weights["convert"] = 60
        if options.calibration_dataset is not None:
            weights["calibrate"] = 120
        return weights

    def run(self, job: Job[GGUFOptions]) -> None:
        """Convert, compute the importance matrix where asked for, quantize, and check the file as llama.cpp reads it."""
        source, options = job.source, job.options
        outtype = steps.intermediate_type(source)
        _require_space(job, outtype)
        _import_ahead()
        is_gguf = source.input_format == "gguf"
        kept = _kept_intermediate(job, outtype)
        origin = list(source.weight_files) if is_gguf else [steps.run_converter(job, outtype)]
        headers = [read_gguf_header(file) for file in origin]
        _check_types(options, headers)
        matrix = importance_matrix(job, origin[0], headers)
        fallbacks, loaded = steps.run_quantize(job, origin[0], headers, matrix.path if matrix else None)
        job.output.written()
        self._verify(job, headers, loaded)
        shown = {key: value for key, value in loaded.items() if not key.startswith("probe_")}
        job.report |= {"fallbacks": fallbacks, "loaded": shown}
        if matrix:
            job.report["importance_matrix"] = matrix.report()
        if fallbacks:
            self.log.warning(
                "%d of %d tensors could not be given the type %s asks for; see the manifest",
                len(fallbacks),
                len(headers[0].tensors),
                job.format.name,
            )
        if kept is not None:
            job.files.check()
            origin[0].replace(kept)
            job.report["intermediate"] = str(kept)

    def _verify(self, job: Job[GGUFOptions], headers: list[GGUFHeader], loaded: LoadedModel) -> None:
        """Read the written file back, compare, and report what it holds."""
        job.progress.stage("verify", "reading the file back")
        output = read_gguf_header(job.output.path)
        check_tensors(headers, output)
        check_metadata(headers[0], output)
        if loaded["parameters"] != output.parameters:
            raise IntegrityError(
                f"llama.cpp finds {loaded['parameters']:,} parameters, and the file has {output.parameters:,}"
            )
        tokenizer: Mapping[str, Any] = {}
        dropped: list[str] = []
        if job.source.input_format != "gguf":
            tokenizer = {
                **check_tokenizer(job.source.path, output),
                "tokenization": check_tokenization(job.source.path, loaded),
            }
            dropped = dropped_tensors(job.source, headers[0])
        if dropped:
            self.log.warning(
                "%d source tensors have no place in the GGUF: %s …", len(dropped), ", ".join(dropped[:3])
            )
        job.progress.update(1, 2, "decoding sampled rows")
        measured = measure(headers, output)
        self._warn_of_noise(measured, job.format.name)
        job.report |= {
            "bits_per_weight": round(output.tensor_bytes * 8 / max(output.parameters, 1), 3),
            "tensor_types": dict(Counter(tensor.type for tensor in output.tensors.values())),
            "sqnr_db": {each.name: each.reported_db for each in measured},
            "tokenizer": tokenizer,
            "dropped": dropped,
            "converter": lock()["release"],
        }

    def _warn_of_noise(self, measured: Iterable[TensorQuality], format_name: str) -> None:
        worst = min(measured, key=lambda quality: quality.sqnr_db, default=None)
        if worst is not None and worst.sqnr_db < _NOISY_DB:
            self.log.warning(
                "%s keeps %.1f dB of %s: expect noise unless the model was trained for such weights",
                format_name,
                worst.sqnr_db,
                worst.name,
            )


def _import_ahead() -> None:
    """Do verification's imports while this process only waits for the converter."""

    def work() -> None:
        with suppress(ImportError):  # said where they are used
            for name in _VERIFIERS:
                import_module(name)

    with suppress(RuntimeError):  # no thread to be had: later then
        threading.Thread(target=work, name="qwodel-imports", daemon=True).start()


def _model_name(source: ModelSource) -> str:
    """Return the model's name without split and encoding suffixes."""
    return _ENCODING_SUFFIX.sub("", _SPLIT_SUFFIX.sub("", source.name)) or source.name


def _kept_intermediate(job: Job[GGUFOptions], outtype: str) -> Path | None:
    """Return where the intermediate will be kept, or ``None``; refuse to replace what is there."""
    if not job.options.keep_intermediate or job.source.input_format == "gguf":
        return None
    kept = job.output.final.with_name(f"{_model_name(job.source)}-{outtype.upper()}.gguf")
    if kept.exists() and not job.output.overwrite:
        raise ValidationError(
            f"{kept} exists already, and keep_intermediate would replace it",
            hint="start from it, pass overwrite=True (--overwrite), or choose another output_dir",
        )
    return kept


def _check_types(options: GGUFOptions, headers: list[GGUFHeader]) -> None:
    """Refuse types that llama.cpp would not apply, or only fail on."""
    shapes = {tensor.name: tensor.shape for header in headers for tensor in header.tensors.values()}
    for pattern in options.tensor_types:
        if not any(name_pattern(pattern).search(name) for name in shapes):
            raise ConfigurationError(
                f"tensor_types: no tensor of the model matches {pattern!r}",
                hint=f"names look like {next((n for n in shapes if n.startswith('blk.')), next(iter(shapes)))}",
            )
    wanted, shape = options.token_embedding_type, shapes.get("token_embd.weight")
    if wanted is not None and shape is not None:
        block = next(block for name, block, _ in GGML_TYPES.values() if name == wanted)
        if shape[-1] % block:
            raise ConfigurationError(
                f"token_embedding_type {wanted} needs rows that divide by {block}, and token_embd.weight has {shape[-1]}",
                hint="take a type with blocks of 32, such as Q8_0 or Q5_0",
            )


def _check_requantize(source: ModelSource, spec: FormatSpec, options: GGUFOptions) -> None:
    quantized = [kind for kind in source.dtypes if kind not in ("F32", "F16", "BF16", "F64")]
    if quantized and not options.allow_requantize:
        raise ValidationError(
            f"{source.given} is quantized already ({', '.join(quantized)})",
            hint=f"convert the original weights to {spec.name}; or pass allow_requantize=True and accept the loss",
        )


def _check_directory(source: ModelSource) -> None:
    if source.path.is_file():
        raise ValidationError(
            f"{source.given} is a single file", hint="give the model directory that holds it"
        )
    if not source.config:
        raise ValidationError(
            f"{source.path} has no config.json",
            hint="give the directory that save_pretrained wrote, or a hub download",
        )
    converter().check_architecture(source.config)
    has_tokenizer = any((source.path / name).is_file() for name in _TOKENIZERS)
    if not has_tokenizer and not any(source.path.glob("*.tiktoken")):
        raise ValidationError(
            f"{source.path} has no tokenizer, and a GGUF carries one",
            hint="copy tokenizer.json (or tokenizer.model) and tokenizer_config.json from the model's repository",
        )


def _require_space(job: Job[GGUFOptions], outtype: str) -> None:
    """Refuse at once what the disk cannot hold: intermediate and result at the same time."""
    kind = file_type(job.format.name)
    # Fallback types and embeddings make small models larger than nominal.
    result = job.source.parameters * max(kind.bits, 1.0) * 1.25 / 8
    intermediate = 0.0
    if job.source.input_format != "gguf":
        intermediate = job.source.parameters * (4 if outtype == "f32" else 2)
    require_space(job.output.final.parent, int(intermediate + result), f"making {job.output.final.name}")
