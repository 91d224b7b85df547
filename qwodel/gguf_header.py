"""GGUF headers: metadata and tensor descriptions, read without touching tensor data.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2
and 3). Arrays are kept as the bytes they are, so a header with a vocabulary of
250 000 tokens reads in milliseconds and two headers compare byte by byte.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwodel.exceptions import IntegrityError, ValidationError
from qwodel.untrusted import open_regular

__all__ = ["GGML_TYPES", "GGUFArray", "GGUFHeader", "GGUFTensor", "read_gguf_header"]

GGML_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip
"""ggml type number → (name, elements per block, bytes per block)."""

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_MAX_NAME = 1024  # llama.cpp's own limit is 63
_MAX_NESTING = 4
_MAX_ELEMENTS = (1 << 63) - 1
_DAMAGED = "download or convert the file again"


@dataclass(frozen=True, slots=True)
class GGUFArray:
    """An array value, undecoded: its element type, length and bytes."""

    element_type: int
    count: int
    raw: bytes

    def decode(self) -> list[Any]:
        """Return the elements as Python values (strings, numbers or booleans).

        Raises:
            ValidationError: its elements are arrays, which no model's metadata has.
        """
        if self.element_type == _STRING:
            return list(self._strings())
        if self.element_type == _ARRAY:
            raise ValidationError("arrays of arrays do not occur in model metadata")
        code = _SCALARS[self.element_type][1]
        return list(struct.unpack(f"<{self.count}{code}", self.raw))

    def _strings(self) -> Iterator[str]:
        position = 0
        for _ in range(self.count):
            (length,) = struct.unpack_from("<Q", self.raw, position)
            yield self.raw[position + 8 : position + 8 + length].decode("utf-8", "replace")
            position += 8 + length


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor: ``shape`` in row-major order (ggml's dimensions reversed), ``begin`` from the file's start."""

    name: str
    type: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Metadata and tensors of one GGUF file."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    size: int

    @property
    def architecture(self) -> str | None:
        """llama.cpp's name of the architecture; ``None`` where the file does not say."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else None

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without padding between them."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor is stored in a block type."""
        sizes = {name: block for name, block, _ in GGML_TYPES.values()}
        return any(sizes.get(tensor.type, 1) > 1 for tensor in self.tensors.values())


def read_gguf_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read and check the header of the GGUF file at ``path``.

    Raises:
        ValidationError: the file is missing, no regular file, not GGUF, or has an unknown version or
            tensor type.
        IntegrityError: the file is truncated, or its header is damaged: names that occur twice, tensors
            that overlap, an alignment that is no power of two.
    """
    path = Path(path)
    with open_regular(path) as file:
        try:
            if file.read(4) != b"GGUF":
                raise ValidationError(f"{path} is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data).parse()
        except OSError as error:
            raise ValidationError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, struct.error, OverflowError) as error:
            if isinstance(error, ValidationError):
                raise
            raise IntegrityError(
                f"{path} has a damaged or truncated GGUF header ({error})", hint=_DAMAGED
            ) from error


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 4

    def parse(self) -> GGUFHeader:
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ValidationError(f"{self.path} is GGUF version {version}; versions 2 and 3 can be read")
        tensor_count, value_count = self._scalar("<Q"), self._scalar("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = self._string()
            if key in metadata:
                raise ValueError(f"the metadata {key[:100]!r} is there twice")
            metadata[key] = self._value(self._scalar("<I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = _alignment(metadata)
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, kind, shape, offset in infos:
            if name in tensors:
                raise ValueError(f"tensor {name!r} is there twice")
            if offset % alignment:
                raise ValueError(
                    f"tensor {name!r} begins at {offset:,}, which is not a multiple of {alignment}"
                )
            tensors[name] = self._tensor(name, kind, shape, start + offset)
        self._check_places(tensors)
        return GGUFHeader(self.path, version, metadata, tensors, len(self.data))

    def _check_places(self, tensors: Mapping[str, GGUFTensor]) -> None:
        end, before = 0, ""
        for tensor in sorted(tensors.values(), key=lambda each: (each.begin, each.nbytes)):
            if tensor.begin < end:
                raise ValueError(f"tensor {tensor.name!r} overlaps {before!r}")
            end, before = tensor.begin + tensor.nbytes, tensor.name
            if end > len(self.data):
                raise IntegrityError(
                    f"{self.path} is truncated: tensor {tensor.name!r} ends at byte {end:,} of {len(self.data):,}",
                    hint=_DAMAGED,
                )

    def _tensor(self, name: str, kind: int, shape: tuple[int, ...], begin: int) -> GGUFTensor:
        if kind not in GGML_TYPES:
            raise ValidationError(f"{self.path}: tensor {name!r} has the unknown ggml type {kind}")
        type_name, block, block_bytes = GGML_TYPES[kind]
        elements = math.prod(shape)
        if elements > _MAX_ELEMENTS or (shape[-1] if shape else 1) % block:
            raise ValueError(f"tensor {name!r} is {type_name} of the shape {list(shape)}, which cannot be")
        return GGUFTensor(name, type_name, shape, begin, elements // block * block_bytes)

    def _tensor_info(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        dimensions = self._scalar("<I")
        if dimensions > _MAX_DIMENSIONS or len(name) > _MAX_NAME:
            raise ValueError(f"tensor {name[:100]!r} has {dimensions} dimensions and {len(name)} characters")
        shape = tuple(self._scalar("<Q") for _ in range(dimensions))[::-1]
        return name, self._scalar("<I"), shape, self._scalar("<Q")

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.data, self.position)
        self.position += struct.calcsize(code)
        return value

    def _string(self) -> str:
        return self._take(self._scalar("<Q")).decode("utf-8", "replace")

    def _take(self, length: int) -> bytes:
        if self.position + length > len(self.data):
            raise struct.error(f"{length:,} bytes wanted at {self.position:,} of {len(self.data):,}")
        begin, self.position = self.position, self.position + length
        return self.data[begin : self.position]

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(1)
        raise struct.error(f"unknown metadata type {kind}")

    def _array(self, depth: int) -> GGUFArray:
        if depth > _MAX_NESTING:
            raise ValueError(f"arrays are nested deeper than {_MAX_NESTING} levels")
        kind, count = self._scalar("<I"), self._scalar("<Q")
        begin = self.position
        if kind in _SCALARS:
            return GGUFArray(kind, count, self._take(struct.calcsize(_SCALARS[kind]) * count))
        for _ in range(count):
            if kind == _STRING:
                self._take(self._scalar("<Q"))
            elif kind == _ARRAY:
                self._array(depth + 1)
            else:
                raise struct.error(f"unknown metadata type {kind}")
        return GGUFArray(kind, count, self.data[begin : self.position])


def _alignment(metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    # llama.cpp reads a power of two in 32 bits.
    if type(value) is not int or not 0 < value < 1 << 32 or value & (value - 1):
        raise ValueError(f"general.alignment is {value!r:.100}, not a power of two")
    return value
