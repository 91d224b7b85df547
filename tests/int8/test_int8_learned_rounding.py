from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import qwodel.int8 as int8
from qwodel.algorithms.quant_types import INT8, ROW
from qwodel.algorithms.scales import quantize_matrix
from qwodel.exceptions import ConfigurationError
from qwodel.fp8 import LearnedRoundingConverter as Fp8Converter
from qwodel.int8 import LearnedRoundingConverter


def weight_of(rows: int = 96, cols: int = 150) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def test_constructor_defaults_are_the_documented_ones():
    parameters = inspect.signature(int8.LearnedRoundingConverter).parameters
    documented = {
        "block_size": 128,
        "num_iter": 1000,
        "lr": 0.008,
        "optimizer": "original",
        "lr_schedule": "adaptive",
        "top_p": 0.2,
        "min_k": 64,
        "max_k": 1024,
    }
    assert documented.items() <= {name: p.default for name, p in parameters.items()}.items()
    assert int8.LearnedRoundingConverter().options.schedule.lr == 0.008


@pytest.mark.parametrize(
    ("mode", "shape"), [("tensor", ()), ("row", (96, 1)), ("block", (2, 3)), ("group", (96, 3))]
)
def test_shapes_and_that_the_parts_fit_together(mode, shape):
    converter = int8.LearnedRoundingConverter(block_size=64, num_iter=20, scaling_mode=mode)
    codes, scale, dequantized = converter.convert(weight_of())
    assert (codes.dtype, tuple(scale.shape)) == (int8.TARGET_INT8_DTYPE, shape)
    assert scale.dtype == int8.SCALE_DTYPE
    everywhere = scale
    if mode == "block":
        everywhere = everywhere.repeat_interleave(64, dim=0)[:96]
    if mode in ("block", "group"):
        everywhere = everywhere.repeat_interleave(64, dim=1)[:, :150]
    assert torch.equal(dequantized, codes.float() * everywhere)
    assert int(codes.abs().max()) <= int8.INT8_SYMMETRIC_MAX


def test_statistics_lower_the_output_error():
    weight, generator = weight_of(), torch.Generator().manual_seed(1)
    mix = torch.randn(150, 150, generator=generator)
    inputs = torch.randn(400, 150, generator=generator) * torch.logspace(1, -2, 150) @ mix
    converter = int8.LearnedRoundingConverter()

    def output_error(dequantized):
        return float((inputs @ (dequantized - weight).T).double().square().sum())

    nearest = output_error(quantize_matrix(weight, INT8, ROW).dequantize())
    assert output_error(converter.convert(weight, gram=inputs.T @ inputs)[2]) < 0.4 * nearest
    strength = inputs.square().mean(dim=0).sqrt()
    weighted = ((converter.convert(weight, activation_scales=strength)[2] - weight) * strength).square().sum()
    plain = ((quantize_matrix(weight, INT8, ROW).dequantize() - weight) * strength).square().sum()
    assert weighted < plain


def test_bad_arguments():
    with pytest.raises(ConfigurationError, match="axis"):
        int8.LearnedRoundingConverter(scaling_mode="axis")
    with pytest.raises(ConfigurationError, match="device"):
        int8.LearnedRoundingConverter(device="cuda")
    with pytest.raises(ConfigurationError):
        int8.LearnedRoundingConverter(block_size=0)


def test_every_public_name_is_listed():
    assert set(int8.__all__) <= set(dir(int8))


@pytest.mark.parametrize("converter", [LearnedRoundingConverter, Fp8Converter])
def test_a_device_is_used_or_refused(converter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    gram = torch.eye(40)
    plain, placed = converter(num_iter=5), converter(num_iter=5, device="cpu")
    for one, other in zip(plain.convert(weight, gram=gram), placed.convert(weight, gram=gram), strict=True):
        assert torch.equal(one.float(), other.float())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="'cuda' is not there"):
        converter(device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("converter", [LearnedRoundingConverter, Fp8Converter])
def test_learning_on_cuda_is_as_good_and_comes_back(converter: Any) -> None:
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(512, 160, generator=torch.Generator().manual_seed(1))
    gram = inputs.T @ inputs
    here, there = (
        converter().convert(weight, gram=gram)[2],
        converter(device="cuda").convert(weight, gram=gram)[2],
    )
    assert there.device == weight.device
    losses = [float(((each - weight) @ gram * (each - weight)).sum()) for each in (here, there)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
