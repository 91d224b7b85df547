from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwodel.algorithms.hadamard import Rotation
from qwodel.algorithms.quant_types import FP8_E4M3, INT8, ROW
from qwodel.algorithms.quip import QuipOptions, QuipTransform, quip_transformed
from qwodel.algorithms.scales import dequantize, quantize_matrix
from qwodel.exceptions import ConfigurationError, ValidationError
from qwodel.int8 import GPTQInt8Converter, QuIPInt8Converter
from tests.algorithms.test_scales import gram_of, heavy

SHAPES = [(40, 96), (17, 37), (64, 48), (1, 1), (3, 130)]


def error(done, weight, gram):
    difference = done.double() - weight.double()
    return float(((difference @ gram) * difference).sum())


def test_defaults_are_the_documented_ones():
    quip = inspect.signature(QuIPInt8Converter).parameters
    documented = {
        "block_size": 128, "device": "cuda", "actorder": True, "use_hadamard": True, "seed": None,
        "use_triton": False, "lazy_updates": True, "store_transformed": False, "requant_scheme": "tensor",
        "requant_tensor_use_per_row_scale": True, "streaming_mode": "balanced", "no_memory_limits": False,
        "use_checkpointed_ldlq": False, "checkpointed_ldlq_threshold": 8192, "checkpoint_segments": 4,
    }  # fmt: skip
    assert {name: quip[name].default for name in documented} == documented
    gptq = inspect.signature(GPTQInt8Converter).parameters
    documented = {
        "block_size": 128,
        "device": "cuda",
        "actorder": True,
        "lazy_updates": True,
        "use_triton": False,
    }
    assert {name: gptq[name].default for name in documented} == documented


@pytest.mark.parametrize("mode", ["row", "tensor", "block", "group"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gptq_returns_what_the_codes_decode_to(mode, shape):
    weight, gram = heavy(*shape), gram_of(shape[1])
    converter = GPTQInt8Converter(scaling_mode=mode, scale_block=16)
    codes, scale, done = converter.convert(weight, H=gram)
    assert codes.dtype == torch.int8
    assert codes.shape == weight.shape
    assert torch.equal(done, dequantize(codes, scale, converter.granularity))
    nearest = quantize_matrix(weight, INT8, converter.granularity).dequantize()
    assert error(done, weight, gram) <= error(nearest, weight, gram) * (1 + 1e-4)


def test_without_statistics_the_codes_are_the_nearest():
    weight = heavy(20, 33)
    codes, scale, _ = GPTQInt8Converter().convert(weight)
    nearest = quantize_matrix(weight, INT8, ROW)
    assert torch.equal(codes, nearest.codes)
    assert torch.equal(scale, nearest.scale)
    codes, _, _ = QuIPInt8Converter().convert(weight)
    assert torch.equal(codes, nearest.codes)


@pytest.mark.parametrize("option", [{"lazy_updates": False}, {"block_size": 7}])
def test_settings_of_speed_do_not_change_the_codes(option):
    weight, gram = heavy(30, 70), gram_of(70)
    for kind in (GPTQInt8Converter, QuIPInt8Converter):
        plain = kind().convert(weight, H=gram)
        other = kind(**option).convert(weight, H=gram)
        assert torch.equal(plain[0], other[0])


def test_act_order_changes_the_codes():
    weight, gram = heavy(30, 70), gram_of(70)
    for kind in (GPTQInt8Converter, QuIPInt8Converter):
        assert not torch.equal(
            kind(actorder=False).convert(weight, H=gram)[0], kind().convert(weight, H=gram)[0]
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_quip_rows_are_as_good_as_gptq_rows(shape):
    weight, gram = heavy(*shape), gram_of(shape[1])
    _, scale, quip = QuIPInt8Converter().convert(weight, H=gram)
    assert scale.shape == (shape[0], 1)
    gptq = GPTQInt8Converter().convert(weight, H=gram)[2]
    assert error(quip, weight, gram) <= error(gptq, weight, gram) * 1.0001


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (40, 1)),
        ({"requant_tensor_use_per_row_scale": False}, ()),
        ({"requant_scheme": "block", "block_size": 32}, (2, 3)),
    ],
)
def test_scales_in_the_original_basis(options, shape):
    weight, gram = heavy(40, 96), gram_of(96)
    converter = QuIPInt8Converter(**options)
    codes, scale, done = converter.convert(weight, H=gram)
    assert scale.shape == shape
    assert converter.transform is None
    assert torch.equal(done, dequantize(codes, scale, converter.granularity))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smoothed", [False, True])
def test_stored_transforms_restore_the_weight(shape, smoothed):
    """The codes decode through an inverse rotation that the test builds from matrices of its own."""
    weight, gram = heavy(*shape), gram_of(shape[1])
    peaks = gram.diagonal().sqrt() if smoothed else None
    converter = QuIPInt8Converter(store_transformed=True, seed=5)
    codes, scale, done = converter.convert(weight, H=gram, activation_scales=peaks)
    transform = converter.transform
    assert codes.shape == weight.shape, "nothing is padded"
    left = transform.outputs.apply(torch.eye(shape[0], dtype=torch.float64)).T
    right = transform.inputs.apply(torch.eye(shape[1], dtype=torch.float64)).T
    by_hand = left.T @ (codes.double() * scale.double()) @ right
    if smoothed:
        by_hand = by_hand / transform.smoothing.double()
    else:
        assert transform.smoothing is None
    assert torch.allclose(done.double(), by_hand, atol=1e-5 * float(weight.abs().max()))
    assert float((done - weight).norm() / weight.norm()) < 0.1


def test_rotation_beats_rows_where_weights_have_outliers():
    weight, gram = heavy(64, 256), gram_of(256)
    weight[:, 7] *= 20
    rows = QuIPInt8Converter().convert(weight, H=gram)[2]
    rotated = QuIPInt8Converter(store_transformed=True).convert(weight, H=gram)[2]
    straight = QuIPInt8Converter(store_transformed=True, use_hadamard=False).convert(weight, H=gram)[2]
    assert error(rotated, weight, gram) < 0.5 * error(rows, weight, gram)
    assert error(rotated, weight, gram) < 0.5 * error(straight, weight, gram)


def test_seeds_repeat_and_differ():
    weight, gram = heavy(32, 64), gram_of(64)

    def codes(seed):
        return QuIPInt8Converter(store_transformed=True, seed=seed).convert(weight, H=gram)[0]

    assert torch.equal(codes(None), codes(0))
    assert torch.equal(codes(3), codes(3))
    assert not torch.equal(codes(3), codes(4))


def test_alpha_moves_difficulty():
    weight, gram = heavy(32, 64), gram_of(64)
    peaks = torch.logspace(-2, 2, 64)
    results = [
        QuIPInt8Converter(store_transformed=True).convert(
            weight, H=gram, activation_scales=peaks, smoothquant_alpha=alpha
        )[0]
        for alpha in (0.2, 0.8)
    ]
    assert not torch.equal(*results)


def test_activation_scales_stand_in_for_the_gram_matrix():
    weight = heavy(24, 50)
    peaks = torch.logspace(0, 2, 50)
    rounded = QuIPInt8Converter(requant_tensor_use_per_row_scale=False).convert(
        weight, activation_scales=peaks
    )
    metric = torch.diag(peaks.double().square())
    nearest = quantize_matrix(
        weight, INT8, QuIPInt8Converter(requant_tensor_use_per_row_scale=False).granularity
    )
    assert error(rounded[2], weight, metric) < error(nearest.dequantize(), weight, metric)


def test_checkpointed_ldlq_gives_the_same_codes():
    weight, gram = heavy(30, 300), gram_of(300)
    for stored in (False, True):
        plain = QuIPInt8Converter(store_transformed=stored, block_size=16)
        parts = QuIPInt8Converter(
            store_transformed=stored,
            block_size=16,
            use_checkpointed_ldlq=True,
            checkpointed_ldlq_threshold=100,
            checkpoint_segments=5,
        )
        assert torch.equal(plain.convert(weight, H=gram)[0], parts.convert(weight, H=gram)[0])


_MEMORY = """
import sys, torch
from qwodel.int8 import QuIPInt8Converter
torch.set_num_threads(1)
size = 4096
weight = torch.randn(8, size)
x = torch.randn(size, size)
gram = x.T @ x
del x
converter = QuIPInt8Converter(use_checkpointed_ldlq=sys.argv[1] == "1", checkpointed_ldlq_threshold=1, checkpoint_segments=16)
converter.convert(weight[:, :64], H=gram[:64, :64])
converter.convert(weight, H=gram)
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


@pytest.mark.slow
def test_checkpointed_ldlq_needs_less_memory():
    def peak(checkpointed):
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY, str(checkpointed)],
            capture_output=True, text=True, timeout=300, check=True, env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        )  # fmt: skip
        return int(done.stdout) * 1024

    matrix = 8 * 4096**2
    assert peak(0) - peak(1) > 0.8 * matrix


def test_transforms_that_do_nothing():
    weight = torch.randn(3, 4)
    assert torch.equal(QuipTransform().apply(weight), weight)
    assert torch.equal(QuipTransform().restore(weight), weight)


@pytest.mark.parametrize("quant_type", [INT8, FP8_E4M3], ids=str)
def test_transformed_grams_are_those_of_transformed_inputs(quant_type):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 24, generator=generator, dtype=torch.float64)
    smoothing = torch.rand(24, generator=generator) + 0.5
    transform = QuipTransform(Rotation.random(8, 1), Rotation.random(24, 0), smoothing)
    turned = transform.inputs.apply(x / smoothing.double())
    assert torch.allclose(transform.gram(x.T @ x), turned.T @ turned, atol=1e-9)
    weight = torch.randn(8, 24, generator=generator, dtype=torch.float64)
    outputs = transform.outputs.apply(x @ weight.T)
    assert torch.allclose(turned @ transform.apply(weight).T, outputs, atol=1e-9)
    codes, _ = quip_transformed(weight, quant_type, x.T @ x, QuipOptions())
    assert codes.quant_type == quant_type


@pytest.mark.parametrize(
    "bad",
    [
        {"requant_scheme": "rows"},
        {"checkpoint_segments": 0},
        {"streaming_mode": "fast"},
        {"streaming_thresholds": {"hadamards": 1}},
        {"device": "tpu"},
        {"block_size": 0},
    ],
)
def test_bad_settings(bad):
    with pytest.raises(ConfigurationError):
        QuIPInt8Converter(**bad)


def test_bad_weights():
    for kind in (GPTQInt8Converter, QuIPInt8Converter):
        with pytest.raises(ValidationError, match="1 NaN"):
            kind().convert(torch.tensor([[1.0, float("nan")]]), H=torch.eye(2))
    with pytest.raises(ValidationError, match="is not a matrix"):
        GPTQInt8Converter().convert(torch.ones(3))
    empty = torch.zeros(0, 4)
    assert GPTQInt8Converter().convert(empty)[0].shape == (0, 4)
    assert QuIPInt8Converter(store_transformed=True).convert(empty)[0].shape == (0, 4)


def test_the_weights_are_not_changed():
    weight, gram = heavy(20, 30), gram_of(30)
    before = weight.clone(), gram.clone()
    GPTQInt8Converter().convert(weight, H=gram)
    QuIPInt8Converter(store_transformed=True).convert(weight, H=gram)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
