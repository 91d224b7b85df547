from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwodel.algorithms.gptq import GptqOptions, factorize, gptq, gptq_together, output_error
from qwodel.algorithms.gptq_columns import solve_block, solve_columns
from qwodel.algorithms.quant_types import FP8_E4M3, FP8_E5M2, INT4, INT8, INT16, ROW, TENSOR, Granularity
from qwodel.algorithms.scale_choice import absmax_scale, check_gram
from qwodel.algorithms.scales import quantize_matrix
from qwodel.exceptions import ConfigurationError, ValidationError

from .strategies import granularities, grid_of, quant_types, spread, weights
from .test_scales import gram_of, heavy

CASES = [
    (INT8, ROW),
    (INT8, TENSOR),
    (INT8, Granularity.group(10)),
    (INT8, Granularity.block(16)),
    (FP8_E4M3, TENSOR),
    (FP8_E4M3, ROW),
    (FP8_E5M2, Granularity.block(7)),
]


def textbook(weight, scale, gram, quant_type, damping, act_order):
    """GPTQ as its paper lists it: explicit inverse, its Cholesky factor, one column at a time (numpy, fp64)."""
    H = gram.double().numpy().copy()
    W = weight.double().numpy().copy()
    S = scale.double().numpy()
    grid = grid_of(quant_type).numpy()
    order = np.argsort(-np.diag(H), kind="stable") if act_order else np.arange(len(H))
    H, W, S = H[np.ix_(order, order)], W[:, order], S[:, order]
    H += damping * np.mean(np.diag(H)) * np.eye(len(H))
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    codes = np.zeros_like(W)
    for j in range(W.shape[1]):
        distance = np.abs(W[:, j, None] / S[:, j, None] - grid)
        codes[:, j] = grid[distance.argmin(axis=1)]
        error = (W[:, j] - codes[:, j] * S[:, j]) / U[j, j]
        W[:, j:] -= np.outer(error, U[j, j:])
    out = np.empty_like(codes)
    out[:, order] = codes
    return torch.from_numpy(out)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("quant_type", "granularity"), CASES, ids=str)
def test_codes_are_those_of_the_textbook(quant_type, granularity, act_order):
    weight, gram = heavy(24, 37, seed=3), check_gram(gram_of(37), 37)
    options = GptqOptions(block_size=8, damping=0.05, act_order=act_order, scale="absmax")
    result = gptq(weight, quant_type, granularity, gram, options)
    scale = spread(result.quantized.scale, granularity, weight.shape)
    expected = textbook(weight, scale, gram, quant_type, 0.05, act_order)
    kept = result.loss < result.nearest_loss
    assert kept.sum() >= 20, "this case must be one where GPTQ wins nearly everywhere"
    assert torch.equal(result.quantized.codes.double()[kept], expected[kept])


@pytest.mark.parametrize(
    "options",
    [
        GptqOptions(lazy=False),
        GptqOptions(block_size=1),
        GptqOptions(block_size=1000),
        GptqOptions(block_size=16, segments=3),
        GptqOptions(block_size=100, segments=50),
    ],
)
@pytest.mark.parametrize("quant_type", [INT8, FP8_E4M3], ids=str)
def test_blocks_and_segments_do_not_change_the_codes(options, quant_type):
    weight, gram = heavy(64, 301), gram_of(301)
    plain = gptq(weight, quant_type, ROW, gram).quantized
    other = gptq(weight, quant_type, ROW, gram, options).quantized
    assert torch.equal(plain.codes.view(torch.uint8), other.codes.view(torch.uint8))
    assert torch.equal(plain.scale, other.scale)


def test_the_factor_is_that_of_the_damped_inverse():
    gram = check_gram(gram_of(50), 50)
    for segments in (1, 7):
        factor = factorize(gram, GptqOptions(damping=0.02, block_size=4, segments=segments))
        upper = torch.zeros(50, 50, dtype=torch.float64)
        for start in range(0, 50, 4):
            upper[start : start + 4, start:] = factor.rows(start, min(start + 4, 50))
        damped = gram.double()[factor.order][:, factor.order] + 0.02 * torch.eye(50, dtype=torch.float64)
        assert torch.allclose(upper.T @ upper @ damped, torch.eye(50, dtype=torch.float64), atol=1e-9)
        assert torch.equal(upper, upper.triu())


@settings(max_examples=60, deadline=None)
@given(weights(), quant_types, granularities)
def test_the_identity_gives_round_to_nearest(weight, quant_type, granularity):
    gram = torch.eye(weight.shape[1])
    result = gptq(weight, quant_type, granularity, gram, GptqOptions(scale="absmax"))
    nearest = quantize_matrix(weight, quant_type, granularity)
    assert torch.equal(result.quantized.codes.float(), nearest.codes.float())  # −0 is 0
    assert torch.equal(result.quantized.scale, nearest.scale)


@settings(max_examples=80, deadline=None)
@given(weights(), quant_types, granularities, st.integers(0, 1000), st.integers(1, 80))
def test_never_worse_than_nearest_whatever_the_inputs(weight, quant_type, granularity, seed, samples):
    columns = weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, columns, generator=generator, dtype=torch.float64)
    inputs[:, : columns // 3] *= 100
    inputs[:, columns // 2 : columns // 2 + 2] = 0
    result = gptq(weight, quant_type, granularity, inputs.T @ inputs)
    done = result.quantized.dequantize(torch.float64)
    assert done.isfinite().all()
    nearest = quantize_matrix(weight, quant_type, granularity).dequantize(torch.float64)
    ours = ((done - weight.double()) @ inputs.T).square().sum()
    theirs = ((nearest - weight.double()) @ inputs.T).square().sum()
    noise = 1e-12 * (weight.double() @ inputs.T).square().sum()  # of products in fp32
    assert ours <= theirs * (1 + 1e-4) + noise


def test_output_errors_fall_where_inputs_are_correlated():
    weight, gram = heavy(64, 128), gram_of(128)
    for quant_type, granularity in CASES:
        result = gptq(weight, quant_type, granularity, gram)
        exact = output_error(result.quantized.dequantize() - weight, check_gram(gram, 128))
        assert torch.allclose(result.loss, exact, rtol=1e-4)
        assert result.loss.sum() < 0.5 * result.nearest_loss.sum(), (quant_type, granularity)
        assert torch.allclose(result.signal, output_error(weight, check_gram(gram, 128)))


@pytest.mark.parametrize("inputs", ["many", "few"])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("granularity", [ROW, TENSOR, Granularity.group(10), Granularity.block(16)], ids=str)
@pytest.mark.parametrize("quant_type", [INT4, INT8, INT16, FP8_E4M3, FP8_E5M2], ids=str)
def test_losses_are_those_of_the_product(quant_type, granularity, act_order, inputs):
    """The recursion's own sum against ``E H Eᵀ`` in fp64, with two inputs that are always zero."""
    generator = torch.Generator().manual_seed(5)
    samples = torch.randn(150 if inputs == "many" else 2, 37, generator=generator, dtype=torch.float64)
    samples[:, [4, 30]] = 0
    metric = check_gram(samples.T @ samples, 37)
    options = GptqOptions(block_size=8, act_order=act_order, damping=0.03 if inputs == "many" else 1e-16)
    factor = factorize(metric, options)
    assert not isinstance(factor, float)
    assert (factor.damping > options.damping) == (inputs == "few"), "few inputs must need more damping"
    weights_ = heavy(40, 37).split([28, 12])
    scales = [absmax_scale(weight, quant_type, granularity) for weight in weights_]
    found = solve_columns(weights_, factor, scales, quant_type, granularity, options, solve_block)
    for weight, (solved, loss) in zip(weights_, found, strict=True):
        error = solved.dequantize(torch.float64) - weight.double()
        product = ((error @ metric.double()) * error).sum(dim=1).clamp(min=0)
        terms = (error.square() @ metric.diagonal().double()).max()  # what the product's own sums round
        assert torch.allclose(loss, product, rtol=1e-9, atol=1e-13 * float(terms))


@pytest.mark.parametrize("columns", [1, 128, 301])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_output_error_is_that_of_the_outputs(columns, dtype):
    inputs = torch.randn(400, columns, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    error = heavy(20, columns).to(dtype)
    expected = (error.double() @ inputs.T).square().sum(dim=1)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert torch.allclose(output_error(error, (inputs.T @ inputs).to(dtype)), expected, rtol=tolerance)


def test_rows_are_independent():
    weight, gram = heavy(48, 96), gram_of(96)
    whole = gptq(weight, INT8, ROW, gram).quantized
    parts = [gptq(part, INT8, ROW, gram).quantized for part in weight.split([5, 30, 13])]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.scale, torch.cat([part.scale for part in parts]))


@pytest.mark.parametrize(("quant_type", "granularity"), CASES, ids=str)
def test_weights_with_the_same_inputs_are_solved_together(quant_type, granularity):
    weights_, gram = heavy(60, 50).split([20, 33, 7]), gram_of(50)
    for weight, together in zip(
        weights_, gptq_together(weights_, quant_type, granularity, gram), strict=True
    ):
        alone = gptq(weight, quant_type, granularity, gram)
        assert torch.equal(alone.quantized.codes.float(), together.quantized.codes.float())
        assert torch.equal(alone.quantized.scale, together.quantized.scale)
        assert torch.allclose(alone.loss, together.loss, rtol=1e-9)


def test_few_samples_are_damped():
    """A rank-one Gram matrix has no inverse; the damped one has."""
    inputs = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    result = gptq(heavy(8, 40), INT8, ROW, inputs.T @ inputs, GptqOptions(damping=1e-16))
    assert result.fell_back is None
    assert result.damping > 1e-16


def test_an_indefinite_matrix_falls_back_and_says_so():
    gram = torch.ones(6, 6) * 5
    gram.diagonal().fill_(1)  # no XᵀX has entries beyond its diagonal
    weight = heavy(4, 6)
    result = gptq(weight, INT8, ROW, gram)
    assert "cannot be factored" in (result.fell_back or "")
    assert torch.equal(result.quantized.codes, quantize_matrix(weight, INT8, ROW).codes)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.eye(5), "does not fit"),
        (torch.full((6, 6), float("nan")), "Gram matrix holds 36 NaN"),
        (torch.eye(6) + torch.ones(6, 6).triu(1), "not symmetric"),
        (-torch.eye(6), "negative diagonal"),
    ],
)
def test_statistics_that_cannot_be(gram, message):
    with pytest.raises(ValidationError, match=message):
        gptq(torch.ones(4, 6), INT8, ROW, gram)


@pytest.mark.parametrize(
    "bad", [{"block_size": 0}, {"damping": 0.0}, {"damping": 2.0}, {"segments": 0}, {"scale": "best"}]
)
def test_options_are_checked(bad):
    with pytest.raises(ConfigurationError):
        GptqOptions(**bad)
