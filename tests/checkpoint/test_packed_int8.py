"""INT8 codes four to an int32, against compressed-tensors, and read back as a source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.formats.packed import pack_int8, unpack_int8
from qwodel.checkpoint.source.dequantize_sources import resolve_sources
from qwodel.exceptions import ValidationError

CODES = torch.arange(-128, 128).reshape(8, 32).to(torch.int8)
NAME = "model.layers.0.mlp.experts.3.up_proj.weight"


def test_the_words_are_those_of_compressed_tensors() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    packed = pack_int8(CODES)
    assert packed.shape == (8, 8)
    assert torch.equal(packed, helpers.pack_to_int32(CODES, 8))
    assert torch.equal(unpack_int8(packed), CODES)


def _write(folder: Path, bits: int, shape: tuple[int, int]) -> dict[str, object]:
    scale = torch.linspace(0.1, 2, 8)[:, None]
    tensors = {
        f"{NAME}_packed": pack_int8(CODES),
        f"{NAME}_scale": scale,
        f"{NAME}_shape": torch.tensor(shape),
    }
    save_file(tensors, folder / "model.safetensors")
    group = {"format": "pack-quantized", "weights": {"num_bits": bits, "symmetric": True}}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return {"quantization_config": config}


def test_a_packed_source_is_decoded(tmp_path: Path) -> None:
    config = _write(tmp_path, 8, (8, 32))
    with UnifiedSafetensorsLoader(tmp_path, low_memory=True) as reader:
        sources = resolve_sources(reader, config)
        (weight,) = sources.tensors
        assert (weight.name, weight.shape) == (NAME, (8, 32))
        assert f"{NAME}_shape" in sources.dropped
        expected = CODES.float() * torch.linspace(0.1, 2, 8)[:, None]
        assert torch.equal(weight.row_decoder.rows(reader, 2, 5), expected[2:5])


@pytest.mark.parametrize(("bits", "shape"), [(4, (8, 64)), (8, (8, 31))])
def test_other_packings_are_refused(bits: int, shape: tuple[int, int], tmp_path: Path) -> None:
    config = _write(tmp_path, bits, shape)
    with (
        UnifiedSafetensorsLoader(tmp_path, low_memory=True) as reader,
        pytest.raises(ValidationError, match="already quantized"),
    ):
        resolve_sources(reader, config)
