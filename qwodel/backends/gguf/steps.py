"""The two native steps of a GGUF run, with their progress and their true errors."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from qwodel.backends.base import Job
from qwodel.backends.gguf.answers import LoadedModel
from qwodel.backends.gguf.formats import file_type
from qwodel.backends.gguf.native import NativeFailure, run_worker
from qwodel.backends.gguf.options import GGUFOptions
from qwodel.backends.gguf.toolchain import converter
from qwodel.backends.gguf.verify import PROBE
from qwodel.exceptions import (
    CalibrationError,
    ConversionError,
    IntegrityError,
    QuantizationError,
    ResourceError,
    ValidationError,
)
from qwodel.gguf_header import GGUFHeader
from qwodel.hardware import cpu_count
from qwodel.progress import Progress
from qwodel.source import ModelSource

__all__ = ["FallBack", "Heartbeat", "intermediate_type", "run_converter", "run_quantize"]

_WRITING = re.compile(r"Writing:\s*(\d+)%\|[^|]*\|\s*([\d.]+\w*)/([\d.]+\w*)")
_TENSOR = re.compile(r"\[\s*(\d+)/\s*(\d+)\]\s+(\S+)\s+-")
_FALLBACK = re.compile(
    r"warning: (\S+)\s+- ncols\s+(\d+) not divisible by\s+(\d+) \(required for type\s+(\w+)\)"
    r".*?falling back to\s+(\w+)",
    re.DOTALL,
)
_PYTHON_ERROR = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Interrupt))(?::\s*(.*))?$")


def intermediate_type(source: ModelSource) -> str:
    """Return the converter's ``--outtype`` that loses nothing of the source's matrices."""
    kinds = {info.dtype for info in source.tensors.values() if len(info.shape) > 1}
    if kinds <= {"BF16", "F8_E4M3", "F8_E5M2", "I8", "U8", "I32", "F8_E8M0", "F4"} and kinds:
        return "bf16"
    return "f16" if kinds == {"F16"} else "f32"


class FallBack(TypedDict):
    """A tensor that could not have the type that was ``asked``, and the one it ``got``."""

    tensor: str
    asked: str
    got: str


class Heartbeat:
    """Repeats the present state with the seconds it has lasted, so that a long step can be cancelled."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._state: tuple[float, float, str] = (0, 1, "")
        self._since = time.monotonic()

    def update(self, done: float, total: float, message: str) -> None:
        """Report ``done`` of ``total`` and remember it."""
        self._state, self._since = (done, total, message), time.monotonic()
        self._progress.update(done, total, message)

    def beat(self) -> None:
        """Report the remembered state again."""
        done, total, message = self._state
        self._progress.update(done, total, f"{message} ({time.monotonic() - self._since:.0f} s)")


def run_converter(job: Job[GGUFOptions], outtype: str) -> Path:
    """Run llama.cpp's converter on the source directory and return the intermediate's path.

    Raises:
        ConversionError: the converter failed; the message has its own words.
    """
    tool, target = converter(), job.output.scratch / "intermediate.gguf"
    heart = Heartbeat(job.progress)
    job.progress.stage("convert", f"starting llama.cpp's converter on {job.source.name}")
    heart.update(0, 1, "reading config and tokenizer")

    def on_line(line: str) -> None:
        if match := _WRITING.search(line):
            heart.update(int(match[1]), 100, f"writing {outtype} GGUF: {match[2]} of {match[3]}B")

    arguments = [str(job.source.path), "--outfile", str(target), "--outtype", outtype]
    if job.source.revision:  # a hub cache's folder is named after the commit
        arguments += ["--model-name", job.source.name]
    request = {"script": str(tool.script), "arguments": arguments}
    try:
        run_worker("convert", request, on_line=on_line, on_heartbeat=heart.beat)
    except NativeFailure as failure:
        raise _converter_error(failure, job.source) from failure
    if not target.is_file():
        raise ConversionError("llama.cpp's converter ended without writing a file")
    return target


def _converter_error(failure: NativeFailure, source: ModelSource) -> QuantizationError:
    cause = str(failure)
    for line in reversed(failure.lines):
        if (
            (match := _PYTHON_ERROR.match(line.strip()))
            and match[1] != "SystemExit"
            and "gave up" not in line
        ):
            cause = match[2] or match[1]
            if match[1] == "KeyError":
                cause = f"config.json or the tokenizer's files lack the key {match[2]}"
            break
    if re.fullmatch(r"\d+ requested and \d+ written", cause):  # numpy's word for a short write
        return ResourceError(
            f"the disk is full, or a file size limit is reached, while converting {source.name}",
            hint="free some space, or choose an output_dir on a larger disk",
        )
    if "carries code of its own" in cause:
        return ValidationError(
            f"{source.name}: {cause}",
            hint="use a release of the model that transformers supports by itself, or convert it in a sandbox of your own",
        )
    if "pre-tokenizer" in cause:
        return ValidationError(
            f"llama.cpp does not know the tokenizer of {source.name}: {cause}",
            hint="a changed tokenizer.json is the usual reason; take the original one",
        )
    return ConversionError(
        f"llama.cpp's converter failed on {source.name}: {cause}",
        hint="the whole traceback is in the chained error's lines; run with --verbose to see it",
    )


def run_quantize(
    job: Job[GGUFOptions], origin: Path, headers: list[GGUFHeader], imatrix: Path | None
) -> tuple[list[FallBack], LoadedModel]:
    """Quantize ``origin`` into the staged output and load the result with llama.cpp.

    Returns:
        The fall-backs llama.cpp took (``tensor``, ``asked``, ``got``), and what it
        made of the result when it loaded it.
    """
    options = job.options
    tracker = _QuantizeTracker(Heartbeat(job.progress), headers)
    job.progress.stage("quantize", f"planning {job.format.name}")
    request = {
        "source": str(origin),
        "target": str(job.output.path),
        "ftype": file_type(job.format.name).number,
        "nthread": options.nthread or cpu_count(),
        "allow_requantize": options.allow_requantize,
        "pure": options.pure,
        "output_tensor_type": options.output_tensor_type,
        "token_embedding_type": options.token_embedding_type,
        "tensor_types": list(options.tensor_types.items()),
        "imatrix": str(imatrix) if imatrix else None,
        "probe": PROBE,
    }
    try:
        loaded = run_worker("quantize", request, on_event=tracker.on_event, on_heartbeat=tracker.heart.beat)
    except NativeFailure as failure:
        raise _quantize_error(failure, job) from failure
    return tracker.fallbacks(), cast("LoadedModel", loaded)


def _quantize_error(failure: NativeFailure, job: Job[GGUFOptions]) -> QuantizationError:
    cause = str(failure)
    if "imatrix" in cause or "importance matrix" in cause:
        return CalibrationError(
            f"{job.format.name}: {cause}",
            hint="compute the matrix on this very model: pass calibration_dataset=",
        )
    if "requantizing" in cause:
        return ValidationError(cause, hint="pass allow_requantize=True and accept the loss")
    if "not finite" in cause:
        return IntegrityError(
            f"{job.output.final.name}: {cause}",
            hint="a source with NaN or with values that overflow does this; so does too coarse a format",
        )
    return ConversionError(f"llama.cpp could not make {job.output.final.name}: {cause}")


class _QuantizeTracker:
    """Follows llama.cpp's log: which tensor it is at, and which types it could not give."""

    def __init__(self, heart: Heartbeat, headers: list[GGUFHeader]) -> None:
        self.heart = heart
        self._sizes: Mapping[str, int] = {
            t.name: t.nbytes for header in headers for t in header.tensors.values()
        }
        self._total = sum(self._sizes.values())
        self._done = 0
        self._current = 0
        self._line = ""
        self._log: list[str] = []

    def on_event(self, event: Mapping[str, Any]) -> None:
        if "log" not in event:
            return
        self._log.append(event["log"])
        self._line = (self._line + event["log"])[-400:]
        if match := _TENSOR.search(self._line):
            self._line = ""
            self._done += self._current
            self._current = self._sizes.get(match[3], 0)
            self.heart.update(
                self._done,
                self._total,
                f"tensor {match[1]}/{match[2]} {match[3]}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB",
            )

    def fallbacks(self) -> list[FallBack]:
        return [
            {"tensor": match[1], "asked": match[4].upper(), "got": match[5].upper()}
            for match in _FALLBACK.finditer("".join(self._log))
        ]
