from __future__ import annotations

import pytest
import torch

from qwodel.algorithms.bias_correction import correct_bias
from qwodel.algorithms.quant_types import INT8, TENSOR
from qwodel.algorithms.scales import quantize_matrix
from qwodel.algorithms.smoothing import smooth, smoothing_scales, unsmooth
from qwodel.exceptions import ConfigurationError, ValidationError

from .test_scales import heavy


def test_bias_correction_restores_the_mean_output():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 40, generator=generator, dtype=torch.float64) + torch.linspace(-3, 3, 40)
    weight, bias = heavy(30, 40).double(), torch.randn(30, generator=generator, dtype=torch.float64)
    rough = quantize_matrix(weight, INT8, TENSOR).dequantize(torch.float64)
    corrected = correct_bias(bias, weight, rough, inputs.mean(dim=0))
    wanted = (inputs @ weight.T + bias).mean(dim=0)
    torch.testing.assert_close((inputs @ rough.T + corrected).mean(dim=0), wanted)
    before = (inputs @ rough.T + bias - inputs @ weight.T - bias).square().sum()
    after = (inputs @ rough.T + corrected - inputs @ weight.T - bias).square().sum()
    assert after < before


def test_bias_without_a_mean_is_left_alone():
    bias = torch.randn(3)
    assert correct_bias(bias, torch.ones(3, 4), torch.zeros(3, 4), None) is bias


def test_bias_keeps_its_dtype_and_shapes_are_checked():
    bias = torch.zeros(3, dtype=torch.bfloat16)
    corrected = correct_bias(bias, torch.ones(3, 4), torch.zeros(3, 4), torch.ones(4))
    assert corrected.tolist() == [4, 4, 4]
    assert corrected.dtype == torch.bfloat16
    for wrong in (torch.ones(3), torch.ones(4, 1), torch.full((4,), float("nan"))):
        with pytest.raises(ValidationError):
            correct_bias(bias, torch.ones(3, 4), torch.zeros(3, 4), wrong)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_smoothing_scales_follow_the_paper(alpha):
    weight, active = heavy(20, 30).double(), torch.rand(30, dtype=torch.float64) * 50 + 0.1
    expected = active**alpha / weight.abs().amax(dim=0) ** (1 - alpha)
    torch.testing.assert_close(smoothing_scales(active, weight, alpha).double(), expected, rtol=1e-6, atol=0)


def test_half_way_balances_activations_and_weights():
    weight, active = heavy(20, 30).double(), torch.rand(30, dtype=torch.float64) * 50 + 0.1
    scales = smoothing_scales(active, weight).double()
    torch.testing.assert_close(active / scales, (weight * scales).abs().amax(dim=0), rtol=1e-5, atol=0)


def test_smoothed_products_are_the_same():
    weight, inputs = heavy(20, 30).double(), torch.randn(7, 30, dtype=torch.float64)
    scales = smoothing_scales(inputs.abs().amax(dim=0), weight)
    torch.testing.assert_close((inputs / scales.double()) @ smooth(weight, scales).T, inputs @ weight.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_powers_of_two_undo_bit_for_bit(dtype):
    weight = heavy(20, 30).to(dtype)
    scales = smoothing_scales(torch.rand(30) * 100, weight, power_of_two=True)
    assert (scales.log2() == scales.log2().round()).all()
    assert torch.equal(unsmooth(smooth(weight, scales), scales), weight)


def test_any_scales_undo_to_rounding():
    weight = heavy(20, 30)
    scales = smoothing_scales(torch.rand(30) * 100, weight)
    torch.testing.assert_close(unsmooth(smooth(weight, scales), scales), weight, rtol=2e-7, atol=0)


def test_dead_channels_are_left_alone():
    weight = torch.ones(2, 3)
    weight[:, 1] = 0
    assert smoothing_scales(torch.tensor([0.0, 5.0, 4.0]), weight).tolist() == [1, 1, 2]
    assert smoothing_scales(torch.ones(3), torch.ones(0, 3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("active", [torch.ones(2), -torch.ones(3), torch.full((3,), float("inf"))])
def test_bad_activations(active):
    with pytest.raises(ValidationError):
        smoothing_scales(active, torch.ones(2, 3))


def test_bad_alpha_and_scales():
    with pytest.raises(ConfigurationError):
        smoothing_scales(torch.ones(3), torch.ones(2, 3), 1.5)
    for scales in (torch.ones(2), torch.zeros(3)):
        with pytest.raises(ValidationError):
            smooth(torch.ones(2, 3), scales)
