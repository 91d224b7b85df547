from __future__ import annotations

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
