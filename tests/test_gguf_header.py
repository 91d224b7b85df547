from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFWriter

from qwodel.exceptions import IntegrityError, ValidationError
from qwodel.gguf_header import GGML_TYPES, GGUFArray, read_gguf_header


def test_header_agrees_with_the_gguf_package(smollm2_gguf: Path) -> None:
    header, reference = read_gguf_header(smollm2_gguf), GGUFReader(smollm2_gguf)
    assert list(header.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        mine = header.tensors[tensor.name]
        assert mine.type == tensor.tensor_type.name
        assert list(mine.shape) == [int(n) for n in reversed(tensor.shape)]
        assert mine.begin == tensor.data_offset
        assert mine.nbytes == tensor.n_bytes
    for key, field in reference.fields.items():
        if key.startswith("GGUF."):
            continue
        value = header.metadata[key]
        expected = field.contents()
        assert (value.decode() if isinstance(value, GGUFArray) else value) == expected


def test_every_value_type_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint8("a", 200)
    writer.add_int16("b", -5)
    writer.add_uint64("c", 1 << 40)
    writer.add_float64("d", 0.1)
    writer.add_bool("e", True)
    writer.add_string("f", "héllo")
    writer.add_array("g", [1, -2, 3])
    writer.add_array("h", ["x", "", "ÿ"])
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(path)
    values = {k: v.decode() if isinstance(v, GGUFArray) else v for k, v in header.metadata.items()}
    assert values == {
        "general.architecture": "llama", "a": 200, "b": -5, "c": 1 << 40, "d": 0.1, "e": True, "f": "héllo",
        "g": [1, -2, 3], "h": ["x", "", "ÿ"],
    }  # fmt: skip
    assert header.tensors["t"].shape == (2, 3)
    assert not header.is_quantized


def test_the_type_table_agrees_with_the_gguf_package() -> None:
    for kind, (block, size) in GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":  # never stored
            assert GGML_TYPES[int(kind)] == (kind.name, block, size)


def test_damage_is_told_from_other_files(tmp_path: Path, smollm2_gguf: Path) -> None:
    whole = smollm2_gguf.read_bytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(whole[: len(whole) - 1000])
    with pytest.raises(IntegrityError, match="truncated: tensor"):
        read_gguf_header(path)
    path.write_bytes(whole[:5000])
    with pytest.raises(IntegrityError, match="damaged or truncated"):
        read_gguf_header(path)
    path.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(32))
    with pytest.raises(ValidationError, match="version 9"):
        read_gguf_header(path)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValidationError, match="not a GGUF file"):
        read_gguf_header(path)


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _file(
    path: Path, alignment: bytes = struct.pack("<II", 4, 32), infos: Sequence[tuple[bytes, list[int], int, int]] = (),
    values: Sequence[bytes] = (), data: int = 4096,
) -> Path:  # fmt: skip
    """A GGUF file of ``(name, dimensions, ggml type, offset)`` tensors."""
    values = [_text(b"general.alignment") + alignment, *values]
    raw = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(values)) + b"".join(values)
    for name, shape, kind, offset in infos:
        raw += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    path.write_bytes(raw + bytes(-len(raw) % 32 + data))
    return path


@pytest.mark.parametrize(
    "value", [(4, "I", 0), (5, "i", -32), (4, "I", 48), (7, "?", True), (6, "f", 32.0), (10, "Q", 1 << 40)]
)
def test_the_alignment_is_a_power_of_two(value: tuple[int, str, object], tmp_path: Path) -> None:
    kind, code, number = value
    with pytest.raises(IntegrityError, match="not a power of two"):
        read_gguf_header(_file(tmp_path / "x.gguf", struct.pack(f"<I{code}", kind, number)))


@pytest.mark.parametrize(
    ("infos", "said"),
    [
        ([(b"a", [8], 0, 0), (b"a", [8], 0, 32)], "'a' is there twice"),
        ([(b"a", [16], 0, 0), (b"b", [8], 0, 32)], "'b' overlaps 'a'"),
        ([(b"a", [8], 0, 4)], "not a multiple of 32"),
        ([(b"a", [1, 1, 1, 1, 1], 0, 0)], "5 dimensions"),
        ([(b"a", [1 << 40, 1 << 40], 0, 0)], "cannot be"),
        ([(b"a", [33], 8, 0)], "cannot be"),
        ([(b"a", [1 << 20], 0, 0)], "truncated"),
        ([(b"x" * 5000, [8], 0, 0)], "5000 characters"),
    ],
)
def test_tensors_that_cannot_be_are_refused(
    infos: list[tuple[bytes, list[int], int, int]], said: str, tmp_path: Path
) -> None:
    with pytest.raises(IntegrityError, match=said):
        read_gguf_header(_file(tmp_path / "x.gguf", infos=infos))
    assert set(
        read_gguf_header(_file(tmp_path / "x.gguf", infos=[(b"a", [8], 0, 0), (b"b", [8], 0, 32)])).tensors
    ) == {"a", "b"}


def test_metadata_is_bounded(tmp_path: Path) -> None:
    key = _text(b"general.alignment") + struct.pack("<II", 4, 32)
    with pytest.raises(IntegrityError, match="there twice"):
        read_gguf_header(_file(tmp_path / "x.gguf", values=[key]))
    nested = _text(b"n") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3000 + struct.pack("<IQ", 4, 0)
    with pytest.raises(IntegrityError, match="nested deeper"):
        read_gguf_header(_file(tmp_path / "x.gguf", values=[nested]))
    huge = _text(b"n") + struct.pack("<IIQ", 9, 8, 1 << 60)
    with pytest.raises(IntegrityError, match="damaged or truncated"):
        read_gguf_header(_file(tmp_path / "x.gguf", values=[huge]))
