"""The INT8 linear layer against its formula in fp64, and its fall-back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qwodel.algorithms.hadamard import convrot_matrix
from qwodel.algorithms.quant_types import INT8, ROW, TENSOR, Granularity
from qwodel.algorithms.scales import quantize_matrix
from qwodel.exceptions import ConfigurationError
from qwodel.modules import int8_arithmetic, int8_linear
from qwodel.modules.int8_arithmetic import int_mm_works, multiply
from qwodel.modules.int8_linear import Int8Linear


def _linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 21, bias=bias)


def _expected(layer: Int8Linear, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    codes = torch.round(x.float() / scale).clamp(-128, 127).double()
    out = (codes @ layer.weight.double().T) * scale.double() * layer.weight_scale.double().T
    return out + (0 if layer.bias is None else layer.bias.double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("granularity", [ROW, TENSOR])
@pytest.mark.parametrize("activations", ["token", "tensor", "static"])
def test_it_is_the_formula(activations: Any, granularity: Granularity, bias: bool) -> None:
    x = torch.randn(2, 7, 48) * torch.linspace(0.1, 9, 7)[:, None]
    static = 0.02 if activations == "static" else None
    layer = Int8Linear.from_float(
        _linear(bias), granularity=granularity, activations=activations, input_scale=static
    )
    flat = x.reshape(-1, 48)
    scale = {
        "token": flat.abs().amax(1, keepdim=True) / 127,
        "tensor": flat.abs().amax().reshape(1, 1) / 127,
        "static": torch.tensor([[0.02]]),
    }[activations]
    found = layer(x)
    assert found.shape == (2, 7, 21)
    assert layer.exact
    assert torch.allclose(
        found.double(), _expected(layer, flat, scale).reshape(2, 7, 21), rtol=1e-5, atol=1e-5
    )


def test_codes_are_those_of_rounding_and_take_a_byte() -> None:
    linear = _linear()
    layer = Int8Linear.from_float(linear)
    codes = quantize_matrix(linear.weight.detach(), INT8, ROW)
    assert torch.equal(layer.weight, codes.codes)
    assert torch.equal(layer.dequantize(), codes.dequantize())
    assert layer.weight.element_size() == 1


def test_rotated_inputs_meet_rotated_weights() -> None:
    linear, x = _linear(), torch.randn(9, 48)
    x[:, 5] *= 100  # an outlier that the rotation spreads
    plain, rotated = Int8Linear.from_float(linear), Int8Linear.from_float(linear, rotation=16)
    exact = linear(x)

    def error(layer: Int8Linear) -> float:
        return float((layer(x) - exact).norm() / exact.norm())

    assert error(rotated) < 0.5 * error(plain)
    turn = torch.block_diag(*[convrot_matrix(16)] * 3)
    turned = x @ turn
    scale = turned.abs().amax(1, keepdim=True) / 127
    assert torch.allclose(rotated(x).double(), _expected(rotated, turned, scale), rtol=1e-3, atol=1e-3)
    assert float((rotated.dequantize() - linear.weight).norm() / linear.weight.norm()) < 0.01


def test_a_transposed_layer_of_transformers_is_taken() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(21, 48)
    x = torch.randn(4, 48)
    layer = Int8Linear.from_float(conv)
    assert float((layer(x) - conv(x)).norm() / conv(x).norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_output_has_the_inputs_dtype(dtype: torch.dtype) -> None:
    layer = Int8Linear.from_float(_linear())
    assert layer(torch.randn(1, 48, dtype=dtype)).dtype == dtype


def test_a_wrong_product_is_found_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Int8Linear.from_float(_linear()), torch.randn(5, 48)
    expected = layer(x)
    wrong = Int8Linear.from_float(_linear())
    int_mm_works.cache_clear()
    for module in (int8_linear, int8_arithmetic):
        monkeypatch.setattr(
            module, "multiply", lambda codes, weight, **keep: multiply(codes, weight, **keep) + 1
        )
    try:
        found = wrong(x)
    finally:
        int_mm_works.cache_clear()
    assert wrong.exact is False
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_missing_operator_is_found_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(codes: torch.Tensor, weight: torch.Tensor, **keep: bool) -> torch.Tensor:
        raise NotImplementedError("no _int_mm here")

    int_mm_works.cache_clear()
    monkeypatch.setattr(int8_arithmetic, "multiply", absent)
    try:
        assert not int_mm_works("cpu")
    finally:
        int_mm_works.cache_clear()


def test_the_padding_for_cuda_changes_nothing() -> None:
    """The shapes CUDA asks for, checked with a fake device through the same code."""

    class Codes(torch.Tensor):
        @property
        def device(self) -> Any:  # type: ignore[override]
            return torch.device("cuda")

    a = torch.randint(-128, 128, (3, 13)).to(torch.int8)
    b = torch.randint(-127, 128, (5, 13)).to(torch.int8)
    found = multiply(a.as_subclass(Codes), b)
    assert torch.equal(found.as_subclass(torch.Tensor).long(), a.long() @ b.long().T)


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    rounded: list[int] = []

    def counting(rows: torch.Tensor, scale: torch.Tensor | None = None) -> Any:
        rounded.append(len(rows))
        return int8_arithmetic.round_rows(rows, scale)

    monkeypatch.setattr(int8_linear, "round_rows", counting)
    return rounded


def test_layers_that_read_the_same_round_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [Int8Linear.from_float(_linear(bias)) for bias in (True, False)]
    other = Int8Linear.from_float(_linear(), activations="tensor")
    x, y = torch.randn(2, 3, 48), torch.randn(2, 3, 48)
    apart = [layers[0](x), layers[1](x.clone()), other(x.clone()), layers[0](y.clone())]
    rounded = _counted(monkeypatch)
    together = [layers[0](x), layers[1](x)]
    assert len(rounded) == 1
    together += [other(x), layers[0](y)]
    assert len(rounded) == 3
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


def test_an_input_changed_in_place_is_rounded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Int8Linear.from_float(_linear()), torch.randn(5, 48)
    rounded = _counted(monkeypatch)
    before = layer(x)
    x.mul_(-1)
    assert torch.allclose(layer(x) + before, 2 * layer.bias.expand(5, -1), atol=1e-6)  # type: ignore[union-attr]
    with torch.inference_mode():  # tensors made here do not say that they have changed
        z = torch.randn(5, 48)
        before = layer(z)
        z.mul_(-1)
        assert torch.allclose(layer(z) + before, 2 * layer.bias.expand(5, -1), atol=1e-6)  # type: ignore[union-attr]
    assert len(rounded) == 4


@pytest.mark.parametrize("activations", ["token", "tensor", "static"])
def test_long_inputs_are_taken_in_parts(activations: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = 0.02 if activations == "static" else None
    layer = Int8Linear.from_float(_linear(), activations=activations, input_scale=scale, rotation=16)
    x = torch.randn(70, 48) * torch.linspace(0.1, 9, 70)[:, None]
    whole = layer(x)
    monkeypatch.setattr(int8_arithmetic, "_AT_ONCE", 48 * 64)
    monkeypatch.setattr(int8_arithmetic, "_IN_CACHE", 48 * 5)
    monkeypatch.setattr(int8_arithmetic, "_SMALL", 0)
    rounded = _counted(monkeypatch)
    assert torch.equal(layer(x.clone()), whole)
    assert rounded == [64, 6]
    assert layer(x[:0]).shape == (0, 21)


def test_threads_do_not_share_what_they_keep() -> None:
    from concurrent.futures import ThreadPoolExecutor

    layers = [Int8Linear.from_float(_linear()), Int8Linear.from_float(nn.Linear(40, 33))]
    inputs = [torch.randn(64, 48), torch.randn(64, 40)]
    expected = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda n: (n % 2, layers[n % 2](inputs[n % 2])), range(60)))
    assert all(torch.equal(value, expected[which]) for which, value in found)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="input_scale"):
        Int8Linear.from_float(_linear(), activations="static")
    with pytest.raises(ConfigurationError, match="groups of 64"):
        Int8Linear(48, 21, rotation=64)
    with pytest.raises(ConfigurationError, match="rows or of the tensor"):
        Int8Linear.from_codes(quantize_matrix(torch.randn(4, 8), INT8, Granularity.group(4)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_computes_the_same() -> None:
    layer, x = Int8Linear.from_float(_linear()), torch.randn(5, 48)
    expected = layer(x)
    layer.exact = None
    assert torch.allclose(layer.cuda()(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    assert layer.exact
