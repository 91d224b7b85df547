from __future__ import annotations

import pytest
import torch

from qwodel.algorithms.asymmetric import asymmetric_targets
from qwodel.algorithms.data_aware import DataAware, round_together
from qwodel.algorithms.gram import GramAccumulator
from qwodel.algorithms.hadamard import ConvRot
from qwodel.algorithms.quant_types import INT8, ROW


def paths(tokens=400, columns=24, share=0.05, seed=0):
    """Inputs of the unquantized model, and of the quantized one: partly a function of the former."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    source = torch.randn(tokens, columns, generator=generator) @ mixing
    turned = torch.randn(columns, columns, generator=generator) / columns**0.5
    noise = torch.randn(tokens, columns, generator=generator)
    return source, source + share * (source @ turned + noise)


def statistics_of(source, inputs):
    sums = GramAccumulator(inputs.shape[1])
    for part in range(0, len(inputs), 100):
        sums.add(inputs[part : part + 100], source[part : part + 100])
    return sums.result()


@pytest.mark.parametrize("damping", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_targets_are_the_ridge_regression_of_the_outputs(damping, dtype):
    source, inputs = paths()
    weights = [torch.randn(rows, 24).to(dtype) for rows in (7, 3)]
    targets = asymmetric_targets(weights, statistics_of(source, inputs), damping)
    ridge = (damping * inputs.double().square().sum() / inputs.shape[1]).sqrt()
    left = torch.cat([inputs.double(), ridge * torch.eye(24, dtype=torch.float64)])
    for weight, target in zip(weights, targets, strict=True):
        wide = weight.double().T
        expected = torch.linalg.lstsq(left, torch.cat([source.double() @ wide, ridge * wide])).solution.T
        assert target.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.allclose(target.double(), expected, atol=2e-4 * float(expected.abs().max()))
        moved = (target.double() - weight.double()).abs().max()
        assert moved > 1e-3


def test_inputs_that_did_not_drift_leave_weights_alone():
    source, _ = paths()
    weight = torch.randn(5, 24)
    [target] = asymmetric_targets([weight], statistics_of(source, source))
    assert torch.equal(target, weight)
    assert asymmetric_targets([weight], without_source(source))[0] is weight
    dead = statistics_of(torch.ones(30, 24), torch.zeros(30, 24))
    assert asymmetric_targets([weight], dead)[0] is weight


def without_source(inputs):
    sums = GramAccumulator(inputs.shape[1])
    sums.add(inputs)
    return sums.result()


def test_drift_is_known_only_where_every_batch_had_its_source():
    source, inputs = paths()
    sums = GramAccumulator(24)
    sums.add(inputs[:200], source[:200])
    half = sums.copy()
    half.add(inputs[200:])
    assert half.result().drift is None
    sums.add(inputs[200:], source[200:])
    found = sums.result().drift
    expected = (source - inputs).double().T @ inputs.double() / len(inputs)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_drift_of_bf16_inputs_is_as_precise_as_their_difference():
    source, inputs = (each.bfloat16() for each in paths(share=0.01))
    expected = (source.double() - inputs.double()).T @ inputs.double() / len(inputs)
    found = statistics_of(source, inputs).drift
    assert float((found - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("rotated", [False, True])
def test_gptaq_brings_outputs_nearer_to_the_unquantized_ones(rotated):
    source, inputs = paths(4000, 64)
    weights = [torch.randn(32, 64), torch.randn(16, 64)]
    bases = [ConvRot(64) for _ in weights] if rotated else None
    found = {}
    for method in ("gptq", "gptaq"):
        solved = round_together(
            weights, INT8, ROW, statistics_of(source, inputs), DataAware(method), bases=bases
        )
        assert {each.report.method for each in solved} == {method}
        found[method] = [
            float((source @ weight.T - inputs @ each.weight.T).norm())
            for weight, each in zip(weights, solved, strict=True)
        ]
    best = [
        float((source @ w.T - inputs @ torch.linalg.lstsq(inputs, source @ w.T).solution).norm())
        for w in weights
    ]
    for gptaq, gptq, least in zip(found["gptaq"], found["gptq"], best, strict=True):
        assert least <= gptaq < 0.9 * gptq
