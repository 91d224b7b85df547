from __future__ import annotations

import json
import math

import pytest
import torch

from qwodel.evaluation.quality import QualityReporter, sqnr
from qwodel.exceptions import ValidationError


def noisy(reference: torch.Tensor, decibels: float, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise *= reference.double().norm() / noise.norm() * 10 ** (-decibels / 20)
    return reference.double() + noise


@pytest.mark.parametrize("decibels", [-3.0, 0.0, 31.5, 90.0])
@pytest.mark.parametrize("shape", [(1,), (7, 11), (1500, 1000), (2, 3, 4, 5)])
def test_sqnr_measures_the_noise_that_was_added(decibels, shape):
    reference = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert sqnr(reference, noisy(reference, decibels)) == pytest.approx(decibels, abs=1e-6)


def test_sqnr_at_the_edges():
    ones, zeros = torch.ones(3), torch.zeros(3)
    assert sqnr(ones, ones) == math.inf
    assert sqnr(zeros, zeros) == math.inf
    assert sqnr(torch.ones(0, 4), torch.ones(0, 4)) == math.inf
    assert sqnr(zeros, ones) == -math.inf
    assert sqnr(ones, torch.tensor([1.0, float("nan"), 1.0])) == -math.inf
    assert sqnr(ones * 1e30, ones * 1.1e30) == pytest.approx(20, abs=1e-3)
    with pytest.raises(ValidationError):
        sqnr(ones, torch.ones(4))


def test_output_sqnr_of_activations_and_of_their_gram_matrix():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 20, generator=generator)
    rough = noisy(weight, 25).float()
    inputs = torch.randn(4, 9, 20, generator=generator) * torch.logspace(1, -1, 20)
    expected = sqnr(inputs @ weight.T, inputs @ rough.T)
    reporter = QualityReporter()
    flat = inputs.reshape(-1, 20)
    by_inputs = reporter.add_layer("a", weight, rough, activations=inputs)
    by_gram = reporter.add_layer("b", weight, rough, gram=flat.T @ flat)
    assert by_inputs.output_sqnr_db == pytest.approx(expected, abs=1e-3)
    assert by_gram.output_sqnr_db == pytest.approx(expected, abs=1e-3)
    assert by_inputs.sqnr_db == pytest.approx(25, abs=1e-3)
    assert by_inputs.mse == pytest.approx(float((rough - weight).double().square().mean()))


def test_report_puts_the_worst_first_and_warns():
    weight = torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    reporter = QualityReporter(threshold=30.0)
    for name, decibels in (("good", 45), ("bad", 12), ("middling", 29.9), ("best", 60)):
        reporter.add_layer(name, weight, noisy(weight, decibels))
    reporter.add_layer("exact", weight, weight)
    assert [layer.name for layer in reporter.layers] == ["bad", "middling", "good", "best", "exact"]
    assert [layer.name for layer in reporter.below_threshold] == ["bad", "middling"]
    lines = reporter.get_report_string().splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["bad", "middling", "good", "best", "exact"]
    assert ["below 30 dB" in line for line in lines[1:6]] == [True, True, False, False, False]
    assert "2 below 30 dB" in lines[-1]


def test_output_counts_before_weight():
    weight = torch.eye(2)
    reporter = QualityReporter(threshold=20)
    reporter.add_layer(
        "silent channel",
        weight,
        torch.diag(torch.tensor([1.0, 0.0])),
        gram=torch.diag(torch.tensor([1.0, 1e-9])),
    )
    assert reporter.below_threshold == []


def test_manifest_form_is_json():
    reporter = QualityReporter()
    reporter.add_layer("exact", torch.ones(2, 2), torch.ones(2, 2))
    reporter.add_layer("dead", torch.zeros(2, 2), torch.ones(2, 2), gram=torch.eye(2))
    report = json.loads(json.dumps(reporter.to_dict(), allow_nan=False))
    assert [layer["name"] for layer in report["layers"]] == ["dead", "exact"]
    assert [float(layer["weight_sqnr_db"]) for layer in report["layers"]] == [-math.inf, math.inf]
    assert report["below_threshold"] == ["dead"]


def test_a_name_given_again_replaces():
    reporter = QualityReporter()
    for other in (torch.zeros(2, 2), torch.ones(2, 2)):
        reporter.add_layer("a", torch.ones(2, 2), other)
    assert [layer.sqnr_db for layer in reporter.layers] == [math.inf]


def test_nothing_measured():
    assert QualityReporter().get_report_string() == "No layers were measured."
    assert QualityReporter().to_dict()["layers"] == []


def test_statistics_must_fit():
    weight = torch.ones(2, 3)
    for given in (
        {"gram": torch.eye(2)},
        {"activations": torch.ones(4, 2)},
        {"gram": torch.eye(3), "activations": weight},
    ):
        with pytest.raises(ValidationError):
            QualityReporter().add_layer("a", weight, weight, **given)
