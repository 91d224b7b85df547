"""Every codec against itself: what it says it writes, writes, reads back and recognises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qwodel.algorithms.scales import Quantized, quantize_matrix
from qwodel.checkpoint.files.dtypes import nbytes, torch_dtype
from qwodel.checkpoint.files.output_tensor import Role
from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.formats.codec import Codec, Dialect
from qwodel.checkpoint.formats.packed import PACKED_INT8
from qwodel.checkpoint.formats.registry import CODECS
from qwodel.checkpoint.source.dequantize_sources import resolve_sources
from qwodel.exceptions import ConfigurationError

QUANTIZING = [*(codec for codec in CODECS.values() if codec.quantizes), PACKED_INT8]
LAYER = "blocks.0.proj"


def _dialects(codec: Codec) -> list[Dialect]:
    found: list[Dialect] = [] if codec is PACKED_INT8 else ["comfyui"]
    try:
        codec.compressed_tensors("dynamic")
    except ConfigurationError:
        return found
    return [*found, "compressed-tensors"]


CASES = [(codec, dialect) for codec in QUANTIZING for dialect in _dialects(codec)]
IDS = [f"{codec}-{dialect}" for codec, dialect in CASES]


def _quantized(codec: Codec, shape: tuple[int, int], seed: int) -> tuple[torch.Tensor, Quantized]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    basis = codec.basis(shape)
    assert codec.quant_type is not None
    return weight, quantize_matrix(
        weight if basis is None else basis.apply(weight), codec.quant_type, codec.granularity
    )


class _Tensors:
    """Parts in memory, as a decoder reads them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def get_tensor(self, key: str, /) -> torch.Tensor:
        return self.tensors[key]

    def get_rows(self, key: str, start: int, stop: int, /) -> torch.Tensor:
        return self.tensors[key][start:stop]

    def get_shape(self, key: str, /) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)


def _stored(codec: Codec, dialect: Dialect, shape: tuple[int, int], quantized: Quantized) -> dict[str, Any]:
    tensors = dict(codec.encode(quantized, dialect))
    for part in codec.parts(shape, dialect):
        if part.payload is not None:
            raw = torch.frombuffer(bytearray(part.payload), dtype=torch.uint8)
            tensors[part.local] = raw.view(torch_dtype(part.dtype)).reshape(part.shape)
    return tensors


@pytest.mark.parametrize(("codec", "dialect"), CASES, ids=IDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(rows=st.integers(1, 5), groups=st.integers(1, 5), seed=st.integers(0, 9))
def test_what_is_encoded_is_decoded_and_has_the_parts_it_says(
    codec: Codec, dialect: Dialect, rows: int, groups: int, seed: int
) -> None:
    shape = (32 * rows, 32 * groups)
    weight, quantized = _quantized(codec, shape, seed)
    assert codec.obstacle(shape, dialect) is None
    tensors = _stored(codec, dialect, shape, quantized)
    parts = codec.parts(shape, dialect)
    assert {part.local for part in parts} == set(tensors)
    for part in parts:
        assert tensors[part.local].nbytes == nbytes(part.dtype, part.shape)
        assert (part.payload is None) == (part.role in (Role.CODES, Role.SCALE))
    decoder = codec.decoder({local: local for local in tensors}, shape, dialect)
    expected = quantized.dequantize()
    basis = codec.basis(shape)
    if basis is not None:
        expected = basis.restore(expected)
    source = _Tensors(tensors)
    torch.testing.assert_close(decoder.rows(source, 0, shape[0]), expected, rtol=1e-5, atol=1e-5)
    start, stop = shape[0] // 3, shape[0] // 3 + 7
    torch.testing.assert_close(decoder.rows(source, start, stop), expected[start:stop], rtol=1e-5, atol=1e-5)
    assert float((expected - weight).abs().max()) < 0.6


@pytest.mark.parametrize(("codec", "dialect"), CASES, ids=IDS)
def test_codes_of_rows_follow_one_another(codec: Codec, dialect: Dialect) -> None:
    shape = (96, 64)
    _, quantized = _quantized(codec, shape, 1)
    whole = codec.encode_codes(quantized.codes, dialect)
    pieces = [codec.encode_codes(quantized.codes[rows], dialect) for rows in (slice(0, 32), slice(32, 96))]
    for local, tensor in whole.items():
        joined = torch.cat([piece[local] for piece in pieces])
        assert torch.equal(joined.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(("codec", "dialect"), CASES, ids=IDS)
def test_every_written_format_is_recognised_again(codec: Codec, dialect: Dialect, tmp_path: Path) -> None:
    shape = (64, 128)
    _, quantized = _quantized(codec, shape, 2)
    tensors = {
        f"{LAYER}.{local}": value.contiguous()
        for local, value in _stored(codec, dialect, shape, quantized).items()
    }
    config: dict[str, Any] = {}
    if dialect == "comfyui":
        text = json.dumps(codec.comfyui_description(shape)).encode()
        tensors[f"{LAYER}.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    else:
        group = {"targets": ["Linear"], **codec.scheme("dynamic")}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": group},
        }
    save_file(tensors, tmp_path / "model.safetensors")
    with UnifiedSafetensorsLoader(tmp_path / "model.safetensors") as reader:
        (found,) = resolve_sources(reader, config).tensors
        assert (found.name, found.shape) == (f"{LAYER}.weight", shape)
        decoded = found.row_decoder.rows(reader, 0, shape[0])
    expected, basis = quantized.dequantize(), codec.basis(shape)
    expected = expected if basis is None else basis.restore(expected)
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", QUANTIZING, ids=str)
def test_nearest_codes_keep_their_bound_and_others_do_not(codec: Codec) -> None:
    shape = (64, 96)
    weight, quantized = _quantized(codec, shape, 3)
    basis = codec.basis(shape)
    rotated = weight if basis is None else basis.apply(weight)
    block = codec.granularity
    scale = quantized.scale
    if block.is_block:
        scale = scale.repeat_interleave(block.block_rows, 0).repeat_interleave(block.block_cols, 1)
        scale = scale[: shape[0], : shape[1]]
    codes = quantized.codes.float()
    allowed = codec.bound(codes.clone(), scale).expand(shape)
    assert bool(((rotated - codes * scale).abs() <= allowed).all())
    wrong = codes.clone()
    wrong[0, 0] = 0 if abs(float(codes[0, 0])) > 1 else wrong.abs().max()
    assert not bool(((rotated - wrong * scale).abs() <= codec.bound(wrong.clone(), scale)).all())


def test_list_formats_comes_from_the_codecs() -> None:
    from qwodel.backends import load_backend

    for backend in ("fp8", "int8"):
        specs = load_backend(backend).formats()
        assert list(specs) == [name for name, codec in CODECS.items() if codec.backend == backend]
        assert all(spec.description and spec.read_by for spec in specs.values())
