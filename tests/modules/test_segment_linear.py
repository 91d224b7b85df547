"""Quantized layers: what codes stand for, and integer products against floating-point ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from qwodel.algorithms.quant_types import FP8_E4M3, INT4, INT6, INT8
from qwodel.exceptions import ConfigurationError, ValidationError
from qwodel.modules.input_rounding import InputFormat, InputRounding, input_grid
from qwodel.modules.quantized_conv import ConvGeometry, QuantizedConv
from qwodel.modules.segment_linear import SegmentLinear, SegmentProduct, common_cuts
from qwodel.modules.weight_codes import WeightCodes, pack_nibbles, unpack_nibbles


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("columns", [1, 6, 7])
def test_nibbles_survive_packing(columns: int) -> None:
    codes = torch.randint(-8, 8, (5, columns)).to(torch.int8)
    packed = pack_nibbles(codes)
    assert packed.shape == (5, -(-columns // 2))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_nibbles(packed, columns), codes)
    low = int(codes[0, 0]) % 16
    assert int(packed[0, 0]) & 15 == low


def rounding(form: InputFormat, sizes: tuple[int, ...], rows: torch.Tensor) -> InputRounding:
    made = InputRounding(form, sizes)
    if form.quant_type is not None and not form.dynamic:
        pieces = rows.split(list(sizes), dim=1)
        low = torch.stack([piece.min().clamp(max=0) for piece in pieces])[None]
        high = torch.stack([piece.max().clamp(min=0) for piece in pieces])[None]
        made.set_grid(input_grid(low, high, form))
    return made


def test_static_dual_and_asymmetric_codes_by_hand() -> None:
    rows = torch.tensor([[4.0, -0.2, 1.0, -0.05]])
    dual = rounding(InputFormat(INT8, dual=True), (4,), rows)
    assert torch.allclose(dual(rows)[0, [0, 1]], rows[0, [0, 1]])
    assert abs(float(dual(rows)[0, 3]) + 0.05) <= 0.2 / 127 / 2
    plain = rounding(InputFormat(INT8), (4,), rows)
    assert abs(float(plain(rows)[0, 3]) + 0.05) > 0.01
    asymmetric = rounding(InputFormat(INT8, symmetric=False), (4,), rows)
    assert float((asymmetric(rows) - rows).abs().max()) <= 4.2 / 255 / 2 + 1e-6


def test_rounding_leaves_its_input_alone() -> None:
    rows = torch.randn(8, 6)
    before = rows.clone()
    for form in (
        InputFormat(INT8),
        InputFormat(INT8, per_token=True, dynamic=True),
        InputFormat(FP8_E4M3),
        InputFormat(None),
    ):
        rounding(form, (2, 4), rows)(rows)
    assert torch.equal(rows, before)


def test_segments_have_scales_of_their_own() -> None:
    rows = torch.cat((torch.randn(64, 5) * 100, torch.randn(64, 3)), dim=1)
    whole, cut = (rounding(InputFormat(INT8), sizes, rows)(rows) - rows for sizes in ((8,), (5, 3)))
    assert float(cut[:, 5:].square().mean()) < 1e-3 * float(whole[:, 5:].square().mean())
    assert torch.equal(cut[:, :5], whole[:, :5])


@pytest.mark.parametrize("kind", [INT4, INT6, INT8], ids=str)
@pytest.mark.parametrize(
    "form",
    [
        InputFormat(INT8),
        InputFormat(INT8, dual=True),
        InputFormat(INT8, symmetric=False),
        InputFormat(INT8, per_token=True, dynamic=True),
        InputFormat(INT8, per_token=True, dynamic=True, symmetric=False),
        InputFormat(INT6, dynamic=True, dual=True),
    ],
    ids=["static", "dual", "zero", "token", "token-zero", "dynamic-dual"],
)
def test_integer_products_are_those_of_the_codes(kind: object, form: InputFormat) -> None:
    rows = torch.randn(9, 12) + 0.3
    top = int(kind.qmax)  # type: ignore[attr-defined]
    for sizes, groups, zeros in itertools.product([(12,), (5, 7)], [(12,), (4, 8)], [False, True]):
        codes = torch.randint(-top, top + 1, (10, 12)).to(torch.int8)
        scale = torch.rand(10, len(groups)) + 0.1
        zero = torch.randint(-5, 5, (10, len(groups))).float() if zeros else None
        weight = WeightCodes.of(codes, kind, scale, groups, zero)  # type: ignore[arg-type]
        product = SegmentProduct(rounding(form, sizes, rows), weight, smoothing=torch.rand(12) + 0.5)
        found, expected = product(rows, real=True), product(rows)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        by_hand = codes.double()
        if zero is not None:
            by_hand = by_hand - zero.repeat_interleave(torch.tensor(groups), 1)
        by_hand = by_hand * scale.double().repeat_interleave(torch.tensor(groups), 1)
        assert torch.allclose(weight.values().double(), by_hand, rtol=1e-6)


def test_common_cuts_of_unequal_divisions() -> None:
    pieces = list(common_cuts((3, 5, 2), (4, 6)))
    assert pieces == [((0, 3), 0, 0), ((3, 4), 1, 0), ((4, 8), 1, 1), ((8, 10), 2, 1)]


def test_scaling_outputs_changes_no_code() -> None:
    weight = WeightCodes.of(torch.randint(-7, 8, (6, 4)).to(torch.int8), INT4, torch.rand(6, 1), (4,))
    part = SegmentProduct(
        InputRounding(InputFormat(INT8, dynamic=True), (4,)),
        weight,
        down=torch.randn(2, 4),
        up=torch.randn(6, 2),
    )
    layer = SegmentLinear([part], torch.randn(6))
    x, factors, codes = torch.randn(3, 4), torch.rand(6) + 0.5, weight.codes.clone()
    expected = layer(x) * factors
    layer.scale_outputs(factors)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert torch.equal(weight.codes, codes)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_convolutions_agree_with_torch(mode: str, real: bool) -> None:
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode=mode)
    codes = torch.randint(-127, 128, (5, 27)).to(torch.int8)
    weight = WeightCodes.of(codes, INT8, torch.rand(5, 1) * 0.01, (27,))
    x = torch.randn(2, 3, 9, 8)
    for form in (
        InputFormat(INT8),
        InputFormat(INT8, symmetric=False),
        InputFormat(INT8, per_token=True, dynamic=True),
    ):
        inputs = rounding(form, (27,), x.reshape(-1, 27))
        layer = QuantizedConv(inputs, weight, conv.bias.detach(), ConvGeometry.of(conv), real=real)
        rounded = inputs(ConvGeometry.of(conv).pad(x).flatten(1)).reshape(2, 3, 11, 10)
        expected = nn.functional.conv2d(rounded, layer.weight, conv.bias, stride=2)
        assert torch.allclose(layer(x), expected, atol=1e-5)
        assert torch.allclose(layer(x[0]), layer(x[:1])[0], atol=1e-6)


def test_grouped_and_one_dimensional_convolutions_are_emulated() -> None:
    for conv, shape in (
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
        (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    ):
        matrix = conv.weight.detach().flatten(1)
        scale = matrix.abs().amax(1, keepdim=True) / 127
        weight = WeightCodes.of((matrix / scale).round().to(torch.int8), INT8, scale, (matrix.shape[1],))
        inputs = InputRounding(InputFormat(INT8, dynamic=True), (matrix.shape[1],))
        layer = QuantizedConv(inputs, weight, conv.bias.detach(), ConvGeometry.of(conv), real=True)
        x = torch.randn(shape)
        assert float((layer(x) - conv(x)).detach().norm() / conv(x).detach().norm()) < 0.02


def test_impossible_formats_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="tokens differ"):
        InputFormat(INT8, per_token=True)
    with pytest.raises(ConfigurationError, match="for integers"):
        InputFormat(FP8_E4M3, symmetric=False)
    with pytest.raises(ConfigurationError, match="either a zero point or dual"):
        InputFormat(INT8, symmetric=False, dual=True)
    with pytest.raises(ValidationError, match="do not make 9"):
        WeightCodes((2, 9), INT8, (4, 4))
