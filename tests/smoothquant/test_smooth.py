"""Smoothing leaves every architecture's function as it is, does what the paper says, and says no where it must."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from qwodel.exceptions import CalibrationError, ConfigurationError, ValidationError
from qwodel.modeling.pairs import Pair
from qwodel.modeling.wiring import find_pairs
from qwodel.modeling.wiring_table import ProducerKind
from qwodel.smoothquant import (
    ActivationStatistics,
    Scheme,
    compute_activation_scales,
    fake_quantized,
    smooth_lm,
    smooth_model,
)
from qwodel.smoothquant.calibration import calibrate
from tests.modeling.test_wiring import CASES, PROBE, tiny

ARCHITECTURES = [name for name in CASES if name != "opt-post-norm"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=PROBE, use_cache=False).logits
    return found.double()


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm())


def statistics(model: nn.Module) -> ActivationStatistics:
    return calibrate(model, [PROBE], sampled_tokens=24)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_function_is_preserved(name: str) -> None:
    model = tiny(name)
    before, old = logits(model), weights(model)
    found = statistics(model)
    smooth_lm(model, found.peaks, alpha=0.8)
    published = logits(model)
    assert change(before, published) <= 1e-5
    norms = [
        pair.producer
        for pair in find_pairs(model)
        if pair.kind in (ProducerKind.NORM, ProducerKind.NORM_PLUS_ONE)
    ]
    for norm in norms:
        assert not torch.equal(model.get_submodule(norm).weight, old[f"{norm}.weight"]), "nothing was done"
    report = smooth_model(
        model, statistics(model), 0.5, inner_alpha="search", head_rotations=True, grid=(0.0, 0.6)
    )
    assert not report.undone
    assert change(before, logits(model)) <= 1e-5
    assert report.change <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_norm_scales_are_the_papers(name: str) -> None:
    model = tiny(name)
    old, peaks = weights(model), compute_activation_scales(model, [PROBE])
    smooth_lm(model, peaks, alpha=0.7)
    pair = next(
        pair for pair in find_pairs(model) if pair.kind in (ProducerKind.NORM, ProducerKind.NORM_PLUS_ONE)
    )
    matrices = [old[f"{consumer}.weight"] for consumer in pair.consumers]
    matrices = [matrix.T if name == "gpt2" else matrix for matrix in matrices]
    scale = peaks[pair.consumers[0]] ** 0.7 / torch.cat(matrices).abs().amax(0) ** 0.3
    norm = old[f"{pair.producer}.weight"]
    expected = (1 + norm) / scale - 1 if name == "gemma2" else norm / scale
    found = model.get_submodule(pair.producer).weight
    assert isinstance(found, torch.Tensor)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_search_lowers_the_error_and_leaves_alone_what_it_cannot_better() -> None:
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[[3, 9]] *= 40
            layer.mlp.up_proj.weight[5] *= 40
    before = logits(model)
    for scheme in (Scheme(), Scheme("tensor", "tensor")):
        with fake_quantized(model, scheme):
            naive = change(before, logits(model))
        searched = tiny("llama")
        searched.load_state_dict(model.state_dict())
        report = smooth_model(searched, statistics(searched), "search", scheme=scheme)
        with fake_quantized(searched, scheme):
            assert change(before, logits(searched)) < 0.8 * naive
        assert {pair.kind for pair in report.pairs} == {
            ProducerKind.NORM,
            ProducerKind.LINEAR,
            ProducerKind.VALUE,
        }
        for pair in report.pairs:
            assert pair.error_before is not None
            assert pair.error_after is not None
            if pair.alpha is None:
                assert pair.error_after == pair.error_before
            else:
                assert pair.error_after < pair.error_before


def test_the_grid_has_both_ends_and_worse_pairs_stay_as_they_are() -> None:
    model = tiny("llama")
    old = weights(model)
    found = statistics(model)
    report = smooth_model(model, found, "search", grid=())
    assert all(pair.alpha is None for pair in report.pairs)
    assert all(torch.equal(old[name], parameter) for name, parameter in model.named_parameters())
    for end in (0.0, 1.0):
        report = smooth_model(tiny("llama"), found, "search", grid=(end,))
        assert any(pair.alpha == end for pair in report.pairs)


def test_a_smoothing_that_changes_the_function_is_undone_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    pairs = find_pairs(model)
    first = pairs[0]
    wrong = Pair(first.producer, first.consumers[1:], first.kind, first.channels, first.outputs)
    old, before = weights(model), logits(model)
    with caplog.at_level(logging.WARNING):
        report = smooth_model(model, statistics(model), 0.8, pairs=(wrong, *pairs[1:]))
    assert report.undone == (first.producer,)
    assert first.producer in caplog.text
    assert change(before, logits(model)) <= 1e-5
    assert torch.equal(model.get_submodule(first.producer).weight, old[f"{first.producer}.weight"])
    norm = next(pair.producer for pair in pairs[1:] if pair.kind is ProducerKind.NORM)
    assert not torch.equal(model.get_submodule(norm).weight, old[f"{norm}.weight"])


def test_where_every_smoothing_fails_the_architecture_is_unsupported() -> None:
    model = tiny("llama")
    pairs = [
        Pair(pair.producer, pair.consumers[1:], pair.kind, pair.channels, pair.outputs)
        for pair in find_pairs(model)
        if len(pair.consumers) > 1
    ]
    old = weights(model)
    with pytest.raises(ValueError, match="unsupported model architecture"):
        smooth_model(model, statistics(model), 0.8, pairs=pairs)
    assert all(torch.equal(old[name], parameter) for name, parameter in model.named_parameters())


def test_half_precision_is_smoothed_by_powers_of_two_without_a_change() -> None:
    model = tiny("llama").bfloat16()
    before, old = logits(model), weights(model)
    smooth_lm(model, compute_activation_scales(model, [PROBE]), alpha=0.5)
    assert torch.equal(logits(model), before)
    norm = "model.layers.0.input_layernorm.weight"
    ratio = (old[norm] / model.get_parameter(norm)).float().log2()
    assert torch.equal(ratio, ratio.round())
    assert len(ratio.unique()) > 1


def test_missing_scales_and_unknown_models_are_errors_and_change_nothing() -> None:
    model = tiny("opt")
    old, peaks = weights(model), compute_activation_scales(model, [PROBE])
    del peaks["model.decoder.layers.1.fc1"]
    with pytest.raises(RuntimeError, match="scales not found for layer model.decoder.layers.1.fc1") as caught:
        smooth_lm(model, peaks)
    assert isinstance(caught.value, CalibrationError)
    with pytest.raises(RuntimeError, match="scales not found for layer"):
        smooth_lm(model, compute_activation_scales(model, [PROBE]), "search")
    with pytest.raises(RuntimeError, match="channels, and it reads"):
        smooth_lm(model, {name: value[:5] for name, value in peaks.items()})
    assert all(torch.equal(old[name], parameter) for name, parameter in model.named_parameters())
    with pytest.raises(ValueError, match="unsupported model architecture Linear") as refused:
        smooth_lm(nn.Linear(3, 3), {})
    assert isinstance(refused.value, ValidationError)
    for alpha in (-0.1, 1.1, "best"):
        with pytest.raises(ConfigurationError, match="alpha"):
            smooth_lm(model, peaks, alpha)  # type: ignore[arg-type]


def test_scale_files_of_mixtral_before_it_was_renamed() -> None:
    model = tiny("mixtral")
    peaks = compute_activation_scales(model, [PROBE])
    older = {name.replace(".mlp.", ".block_sparse_moe."): value for name, value in peaks.items()}
    before = logits(model)
    smooth_lm(model, older)
    assert change(before, logits(model)) <= 1e-5
