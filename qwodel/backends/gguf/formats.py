"""llama.cpp's file types: what each is, and which of them the installed library offers.

Bits per weight are the figures of llama.cpp's own quantize tool (grid bits for the
IQ and TQ types, file size over parameters of Llama-3-8B for the rest); what a given
model really takes is in its manifest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from qwodel.backends.base import FormatSpec

__all__ = ["FILE_TYPES", "FileType", "file_type", "format_specs"]

_READERS = "llama.cpp, Ollama, LM Studio"
_IMATRIX = ("importance matrix",)


@dataclass(frozen=True, slots=True)
class FileType:
    """A llama.cpp file type: its number, the ggml type most tensors get, and what to say of it."""

    number: int
    main_type: str
    bits: float
    description: str
    needs_imatrix: bool = False
    aliases: tuple[str, ...] = ()


FILE_TYPES: Mapping[str, FileType] = {
    "Q4_K_M": FileType(15, "Q4_K", 4.9, "Best balance of speed and quality. Recommended for most users.", aliases=("Q4_K",)),
    "Q8_0": FileType(7, "Q8_0", 8.51, "Near-lossless quality. Requires more RAM."),
    "Q2_K": FileType(10, "Q2_K", 3.17, "Maximum compression without an importance matrix. Reduced quality."),
    "Q3_K_M": FileType(12, "Q3_K", 4.0, "3-bit medium quality.", aliases=("Q3_K",)),
    "Q4_0": FileType(2, "Q4_0", 4.64, "Compact 4-bit, slightly smaller than Q4_K_M."),
    "Q4_K_S": FileType(14, "Q4_K", 4.67, "Small 4-bit K-quant."),
    "Q5_K_M": FileType(17, "Q5_K", 5.7, "Better quality than Q4_K_M, slightly larger.", aliases=("Q5_K",)),
    "Q5_K_S": FileType(16, "Q5_K", 5.57, "Small 5-bit K-quant."),
    "Q6_K": FileType(18, "Q6_K", 6.57, "High quality, between Q5_K_M and Q8_0."),
    "IQ4_NL": FileType(25, "IQ4_NL", 4.5, "4.5 bits on a non-linear grid; rows need only divide by 32."),
    "IQ3_M": FileType(27, "IQ3_S", 3.66, "Compact 3-bit mixture on importance-trained grids; better with an importance matrix."),
    "Q3_K_S": FileType(11, "Q3_K", 3.65, "3-bit small K-quant."),
    "Q3_K_L": FileType(13, "Q3_K", 4.31, "3-bit large K-quant."),
    "Q4_1": FileType(3, "Q4_1", 5.11, "4-bit with offsets; an older type that K-quants improve on."),
    "Q5_0": FileType(8, "Q5_0", 5.57, "5-bit older type, for rows that K-quants cannot take."),
    "Q5_1": FileType(9, "Q5_1", 6.04, "5-bit with offsets, an older type."),
    "Q2_K_S": FileType(21, "Q2_K", 3.17, "Smallest 2-bit K-quant.", needs_imatrix=True),
    "IQ4_XS": FileType(30, "IQ4_XS", 4.25, "4.25 bits on a non-linear grid: the smallest good 4-bit type."),
    "IQ3_S": FileType(26, "IQ3_S", 3.44, "3.44-bit grid, a little smaller than IQ3_M; better with an importance matrix."),
    "IQ3_XS": FileType(22, "IQ3_S", 3.3, "3.3-bit mixture.", needs_imatrix=True),
    "IQ3_XXS": FileType(23, "IQ3_XXS", 3.06, "3.06-bit grid.", needs_imatrix=True),
    "IQ2_M": FileType(29, "IQ2_S", 2.7, "2.7-bit mixture: the usable end of 2 bits.", needs_imatrix=True),
    "IQ2_S": FileType(28, "IQ2_XS", 2.5, "2.5-bit mixture.", needs_imatrix=True),
    "IQ2_XS": FileType(20, "IQ2_XS", 2.31, "2.31-bit grid.", needs_imatrix=True),
    "IQ2_XXS": FileType(19, "IQ2_XXS", 2.06, "2.06-bit grid.", needs_imatrix=True),
    "IQ1_M": FileType(31, "IQ1_M", 1.75, "1.75-bit grid: large models only.", needs_imatrix=True),
    "IQ1_S": FileType(24, "IQ1_S", 1.56, "1.56-bit grid: large models only.", needs_imatrix=True),
    "TQ2_0": FileType(37, "TQ2_0", 2.06, "2.06-bit ternary, for models trained ternary (BitNet)."),
    "TQ1_0": FileType(36, "TQ1_0", 1.69, "1.69-bit ternary, for models trained ternary (BitNet)."),
    "Q2_0": FileType(41, "Q2_0", 2.25, "2.25 bits in groups of 64, for models trained so."),
    "Q1_0": FileType(40, "Q1_0", 1.125, "1.125 bits (signs and scales), for models trained binary."),
    "MXFP4_MOE": FileType(38, "MXFP4", 4.25, "MXFP4 experts, Q8_0 for the rest: mixture-of-experts models only."),
    "BF16": FileType(32, "BF16", 16.0, "bfloat16: no quantization, the converter's output."),
    "F16": FileType(1, "F16", 16.0, "float16: no quantization; values beyond 65504 overflow."),
    "F32": FileType(0, "F32", 32.0, "float32: no quantization."),
}  # fmt: skip


def file_type(name: str) -> FileType:
    """Return the file type of a format that :func:`format_specs` lists."""
    return {**FILE_TYPES, **_newer_types()}[name]


@cache
def format_specs() -> Mapping[str, FormatSpec]:
    """Return the formats, from the installed library where there is one.

    Types this table does not know are listed with the library's own name; types
    the library cannot write are left out.
    """
    offered = _offered()
    known = {n: t for n, t in FILE_TYPES.items() if offered is None or t.number in offered}
    return {
        name: FormatSpec(
            name=name,
            description=kind.description,
            bits=kind.bits,
            read_by=_READERS,
            needs=_IMATRIX if kind.needs_imatrix else (),
            aliases=kind.aliases,
        )
        for name, kind in {**known, **_newer_types()}.items()
    }


@cache
def _offered() -> dict[int, str] | None:
    """Map the installed library's file types to their names; ``None`` where it is not installed."""
    if find_spec("llama_cpp") is None:
        return None
    from llama_cpp import llama_cpp as lib

    names = {
        getattr(lib, name): re.sub(r"^LLAMA_FTYPE_(MOSTLY|ALL)_", "", name)
        for name in dir(lib)
        if re.match(r"LLAMA_FTYPE_(MOSTLY|ALL)_", name)
    }
    return {number: name for number, name in names.items() if _writable(number)}


def _writable(number: int) -> bool:
    """Ask libllama whether it has a tensor type for a file type (it names some it can only read)."""
    import ctypes

    from llama_cpp import llama_cpp as lib

    handle: ctypes.CDLL = lib._lib  # noqa: SLF001 - the bindings do not wrap this function
    default_type = getattr(handle, "_Z28llama_ftype_get_default_type11llama_ftype", None)
    if default_type is None:  # not exported by this build: trust the table
        return number in {kind.number for kind in FILE_TYPES.values()}
    default_type.restype = ctypes.c_int
    return 0 <= int(default_type(ctypes.c_int(number))) < int(lib.GGML_TYPE_COUNT)


@cache
def _newer_types() -> Mapping[str, FileType]:
    offered = _offered() or {}
    known = {kind.number for kind in FILE_TYPES.values()}
    return {
        name: FileType(number, name, 0.0, f"llama.cpp's {name}.")
        for number, name in offered.items()
        if number not in known
    }
