"""MXFP8 against comfy-kitchen's and compressed-tensors' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwodel import quantize
from qwodel.algorithms.quant_types import MXFP8_E4M3
from qwodel.algorithms.scales import quantize_matrix
from qwodel.checkpoint.formats.mxfp8 import MXFP8
from qwodel.checkpoint.source.weights import read_weights
from qwodel.exceptions import ValidationError


@pytest.fixture
def weight() -> torch.Tensor:
    """Rows of very different sizes, a group of zeros, and more rows than a tile."""
    weight = torch.randn(160, 96, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-8, 4, 160)[:, None]
    weight[3, 32:64] = 0
    return weight


def test_codes_and_exponents_are_comfy_kitchens(weight: torch.Tensor) -> None:
    from comfy_kitchen.backends.eager.quantization import quantize_mxfp8

    codes, scales = quantize_mxfp8(weight)
    ours = MXFP8.encode(quantize_matrix(weight, MXFP8_E4M3, MXFP8.granularity), "comfyui")
    assert torch.equal(ours["weight"].view(torch.uint8), codes.view(torch.uint8))
    theirs, written = scales.view(torch.uint8), ours["weight_scale"]
    assert written.shape == theirs.shape
    # A group of zeros has any exponent.
    assert int((written != theirs).sum()) <= 1


def test_the_directory_layout_is_compressed_tensors(weight: torch.Tensor) -> None:
    from compressed_tensors.compressors import BaseCompressor

    quantized = quantize_matrix(weight, MXFP8_E4M3, MXFP8.granularity)
    parts = MXFP8.encode(quantized, "compressed-tensors")
    assert parts["weight_scale"].shape == (160, 3)
    assert parts["weight_scale"].dtype == torch.uint8
    from compressed_tensors.quantization import QuantizationScheme

    decoded = BaseCompressor.load_from_registry("mxfp8-quantized").decompress(
        dict(parts), QuantizationScheme(targets=["Linear"], **MXFP8.scheme("none"))
    )
    torch.testing.assert_close(decoded["weight"].float(), quantized.dequantize(), rtol=2**-7, atol=0)


def test_a_file_for_comfyui(weight: torch.Tensor, tmp_path: Path) -> None:
    save_file({"a.weight": weight, "odd.weight": weight[:, :40].contiguous()}, tmp_path / "in.safetensors")
    path = quantize(tmp_path / "in.safetensors", tmp_path / "out", backend="fp8", format="mxfp8")
    stored = load_file(path)
    assert stored["odd.weight"].dtype == torch.float32
    assert bytes(stored["a.comfy_quant"].numpy().tobytes()).startswith(b'{"format": "mxfp8"')
    decoded = dict(read_weights(path))["a.weight"]
    error = (decoded - weight).abs()
    assert bool((error <= weight.abs() / 16 + 1e-8 * weight.abs().amax(dim=1, keepdim=True)).all())


def test_nothing_that_fits_is_an_error(tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(48, 40)}, tmp_path / "in.safetensors")
    with pytest.raises(ValidationError, match="no multiple of 32"):
        quantize(tmp_path / "in.safetensors", tmp_path / "out", backend="fp8", format="mxfp8")
