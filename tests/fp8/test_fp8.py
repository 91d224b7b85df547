from __future__ import annotations

import inspect

import pytest
import torch

import qwodel.fp8 as fp8
from qwodel.exceptions import ConfigurationError, ValidationError
from qwodel.fp8.optimizers import get_optimizer


def weight_of(rows: int = 64, cols: int = 150) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def test_constructor_defaults_are_the_documented_ones():
    parameters = inspect.signature(fp8.LearnedRoundingConverter).parameters
    assert {name: p.default for name, p in parameters.items() if name != "kwargs"} == {
        "optimizer": "original",
        "num_iter": 500,
        "top_p": 0.01,
        "min_k": 1,
        "max_k": 16,
        "scaling_mode": "tensor",
        "block_size": 64,
        "full_matrix": False,
    }
    assert fp8.LearnedRoundingConverter().options.schedule.lr == 0.01


@pytest.mark.parametrize(("mode", "shape"), [("tensor", (1,)), ("row", (64, 1)), ("block", (64, 3, 1))])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_shapes_and_that_the_parts_fit_together(mode, shape, dtype):
    converter = fp8.LearnedRoundingConverter(scaling_mode=mode, num_iter=20, target_dtype=dtype)
    weight = weight_of()
    quantized, scale, dequantized = converter.convert(weight.bfloat16())
    assert (quantized.dtype, quantized.shape) == (dtype, weight.shape)
    assert (scale.dtype, tuple(scale.shape)) == (fp8.SCALE_DTYPE, shape)
    per_weight = scale.squeeze(-1).repeat_interleave(64, dim=1)[:, :150] if mode == "block" else scale
    assert torch.equal(dequantized, quantized.float() * per_weight)
    assert (weight - dequantized).norm() < 0.08 * weight.norm()


@pytest.mark.parametrize("name", ["original", "adamw", "radam", "ppsf"])
def test_every_optimizer_converts(name):
    converter = fp8.LearnedRoundingConverter(optimizer=name, num_iter=30, scaling_mode="block", lr=0.05)
    quantized, _, _ = converter.convert(weight_of())
    optimize = get_optimizer(name)
    assert optimize(weight_of(), num_iter=30).loss <= optimize(weight_of(), num_iter=0).loss
    assert quantized.dtype == fp8.TARGET_FP8_DTYPE


def test_unknown_names_are_value_errors():
    with pytest.raises(ValueError, match="sgd"):
        fp8.get_optimizer("sgd")
    with pytest.raises(ConfigurationError, match="column"):
        fp8.LearnedRoundingConverter(scaling_mode="column")
    with pytest.raises(ConfigurationError, match="learning_rate"):
        fp8.LearnedRoundingConverter(learning_rate=1.0)
    with pytest.raises(ConfigurationError, match="FP8"):
        fp8.LearnedRoundingConverter(target_dtype=torch.int8)
    with pytest.raises(ConfigurationError, match="float16"):
        fp8.LearnedRoundingConverter(target_dtype=torch.float16)


def test_nan_is_refused():
    weight = weight_of()
    weight[3, 3] = float("nan")
    with pytest.raises(ValidationError, match="1 NaN"):
        fp8.LearnedRoundingConverter().convert(weight)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
def test_constants_against_every_code(dtype):
    values = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    finite = values[values.isfinite()]
    expected = (float(finite.min()), float(finite.max()), float(finite[finite > 0].min()))
    assert fp8.get_fp8_constants(dtype) == expected


def test_constant_values():
    assert (fp8.FP8_MIN, fp8.FP8_MAX, fp8.FP8_MIN_POS) == (-448.0, 448.0, 2.0**-9)
    assert (
        torch.float8_e4m3fn,
        torch.float32,
        torch.float32,
    ) == (fp8.TARGET_FP8_DTYPE, fp8.COMPUTE_DTYPE, fp8.SCALE_DTYPE)
    with pytest.raises(ValueError, match="float16"):
        fp8.get_fp8_constants(torch.float16)


def test_seeds_devices_and_memory():
    assert fp8.get_device() in ("cpu", "cuda")
    fp8.clean_gpu_memory()
    fp8.clean_gpu_memory("cpu")
    for seed in (-1, 42):
        first = torch.randn(5, generator=fp8.setup_seed(seed, "cpu"))
        glob = torch.rand(2)
        again = torch.randn(5, generator=fp8.setup_seed(seed, "cpu"))
        assert torch.equal(first, again)
        assert torch.equal(torch.rand(2), glob)


def test_output_file_names():
    name = fp8.generate_output_filename(
        "dir/model.safetensors", fp8.TARGET_FP8_DTYPE, "block", min_k=1, max_k=16, top_p=0.01
    )
    assert name == "dir/model_float8_e4m3fn_block_k1-16_p0.01.safetensors"
    with pytest.raises(ConfigurationError):
        fp8.generate_output_filename("m.safetensors", fp8.TARGET_FP8_DTYPE, "tensor", min_k=1)
    with pytest.raises(ConfigurationError, match="topp"):
        fp8.generate_output_filename("m.safetensors", fp8.TARGET_FP8_DTYPE, "tensor", topp=1)


def test_every_public_name_is_listed():
    assert set(fp8.__all__) == set(dir(fp8))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fp8.nonsense
