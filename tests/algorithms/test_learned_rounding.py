from __future__ import annotations

import builtins
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwodel.algorithms.grid import grid_neighbours
from qwodel.algorithms.learned_rounding import RoundingOptions, learn_rounding
from qwodel.algorithms.objectives import GramObjective, ProjectedObjective, top_singular_vectors
from qwodel.algorithms.optimizers import RULES, update_rule
from qwodel.algorithms.quant_types import FP8_E4M3, INT8, QUANT_TYPES, ROW, TENSOR, Granularity
from qwodel.algorithms.scales import quantize_matrix
from qwodel.algorithms.schedules import Schedule, ScheduleOptions
from qwodel.algorithms.weight_rounding import round_weight
from qwodel.exceptions import ConfigurationError, DependencyError, ValidationError

from .strategies import granularities, quant_types, weights
from .test_scales import gram_of, heavy

SHORT = RoundingOptions(num_iter=60, top_p=0.1, max_k=8)
PPSF = replace(SHORT, optimizer="ppsf", schedule=ScheduleOptions(lr_factor=0.95))
OPTIONS = {name: replace(SHORT, optimizer=name) for name in RULES} | {"ppsf": PPSF}
EACH_RULE = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def projected_loss(weight: torch.Tensor, dequantized: torch.Tensor, k: int) -> float:
    """‖U_kᵀ(Ŵ−W)V_k‖_F with singular vectors of a full fp64 SVD."""
    exact = weight.double()
    left, _, right = torch.linalg.svd(exact, full_matrices=False)
    return float((left[:, :k].T @ (dequantized.double() - exact) @ right[:k].T).norm())


def output_loss(weight: torch.Tensor, dequantized: torch.Tensor, gram: torch.Tensor) -> float:
    error = dequantized.double() - weight.double()
    return float(((error @ gram) * error).sum())


@EACH_RULE
@pytest.mark.parametrize("quant_type", [INT8, FP8_E4M3], ids=str)
@pytest.mark.parametrize("granularity", [TENSOR, ROW, Granularity.group(50), Granularity.block(32)], ids=str)
def test_projected_error_falls_by_moving_codes(options, quant_type, granularity):
    weight = torch.randn(96, 130, generator=torch.Generator().manual_seed(3))
    nearest = quantize_matrix(weight, quant_type, granularity)
    result = learn_rounding(weight, quant_type, granularity, replace(options, full_matrix=True))
    before = projected_loss(weight, nearest.dequantize(), 8)
    after = projected_loss(weight, result.quantized.dequantize(), 8)
    assert result.nearest_loss == pytest.approx(before, rel=1e-3)
    assert result.loss == pytest.approx(after, rel=1e-2, abs=before * 1e-3)
    assert after < 0.6 * before
    moved = result.quantized.codes.float() != nearest.codes.float()
    assert result.changed == pytest.approx(float(moved.float().mean()))
    assert moved.any()
    assert torch.equal(result.quantized.scale, nearest.scale)


@EACH_RULE
def test_codes_stay_neighbours_of_the_weight(options):
    weight = heavy(64, 96)
    result = learn_rounding(weight, FP8_E4M3, ROW, options)
    low, high = grid_neighbours(weight / result.quantized.scale, FP8_E4M3)
    codes = result.quantized.codes.float()
    assert ((codes == low) | (codes == high)).all()


@EACH_RULE
@pytest.mark.parametrize("quant_type", [INT8, FP8_E4M3], ids=str)
@pytest.mark.parametrize("granularity", [TENSOR, ROW, Granularity.group(48)], ids=str)
def test_output_error_falls_clearly_with_a_gram_matrix(options, quant_type, granularity):
    weight, gram = heavy(64, 120), gram_of(120)
    nearest = quantize_matrix(weight, quant_type, granularity)
    result = learn_rounding(weight, quant_type, granularity, options, gram=gram)
    before = output_loss(weight, nearest.dequantize(), gram)
    after = output_loss(weight, result.quantized.dequantize(), gram)
    assert (result.loss / result.nearest_loss) ** 2 == pytest.approx(after / before, rel=1e-2)
    assert after < 0.3 * before


@EACH_RULE
def test_no_row_loses_output(options):
    weight, gram = heavy(40, 60), gram_of(60)
    nearest = quantize_matrix(weight, INT8, ROW).dequantize().double() - weight.double()
    learned = (
        learn_rounding(weight, INT8, ROW, options, gram=gram).quantized.dequantize().double()
        - weight.double()
    )
    before, after = ((nearest @ gram) * nearest).sum(1), ((learned @ gram) * learned).sum(1)
    assert (after <= before * (1 + 1e-3)).all()


@settings(max_examples=50, deadline=None)
@given(weights(), quant_types, granularities, st.sampled_from(["original", "adamw"]), st.booleans())
def test_never_worse_than_nearest_for_any_weight(weight, quant_type, granularity, optimizer, with_gram):
    gram = gram_of(weight.shape[1]).float() if with_gram and weight.shape[1] else None
    options = RoundingOptions(num_iter=6, optimizer=optimizer, max_k=4)
    result = learn_rounding(weight, quant_type, granularity, options, gram=gram)
    assert result.loss <= result.nearest_loss
    assert result.quantized.codes.shape == weight.shape
    assert result.quantized.dequantize().isfinite().all()
    whole = round_weight(weight, quant_type, granularity, options, gram=gram)
    assert whole.loss <= whole.nearest_loss * (1 + 1e-6)


def test_a_price_on_weight_error_buys_back_weight_sqnr():
    weight = torch.randn(96, 130, generator=torch.Generator().manual_seed(3))
    base = RoundingOptions(num_iter=200, top_p=0.3, max_k=99)
    errors, losses = [], []
    for price in (0.0, 0.5, 5.0):
        result = learn_rounding(weight, INT8, ROW, replace(base, weight_price=price))
        errors.append(float((result.quantized.dequantize() - weight).norm()))
        losses.append(result.loss)
    assert errors == sorted(errors, reverse=True)
    assert losses == sorted(losses)
    nearest = float((quantize_matrix(weight, INT8, ROW).dequantize() - weight).norm())
    assert errors[1] < nearest * 1.03


@EACH_RULE
def test_an_exact_start_stops_at_once(options):
    weight = torch.randint(-127, 128, (32, 40), generator=torch.Generator().manual_seed(0)).float()
    weight[:, 0] = 127
    result = learn_rounding(weight, INT8, ROW, options)
    assert (result.loss, result.changed, result.iterations) == (0.0, 0.0, 0)


def test_zero_iterations_round_to_nearest():
    weight = heavy(30, 30)
    result = learn_rounding(weight, INT8, ROW, RoundingOptions(num_iter=0))
    assert torch.equal(result.quantized.codes, quantize_matrix(weight, INT8, ROW).codes)


@EACH_RULE
@pytest.mark.parametrize("with_gram", [False, True])
def test_same_codes_every_time_and_for_any_number_of_threads(options, with_gram):
    weight = heavy(96, 128)
    gram = gram_of(128) if with_gram else None
    torch.manual_seed(1)
    first = learn_rounding(weight, FP8_E4M3, ROW, options, gram=gram).quantized.codes.view(torch.uint8)
    for threads in (1, 2, 3):
        torch.manual_seed(threads + 5)
        torch.set_num_threads(threads)
        again = learn_rounding(weight, FP8_E4M3, ROW, options, gram=gram).quantized.codes.view(torch.uint8)
        assert torch.equal(again, first)


def test_global_random_state_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    learn_rounding(heavy(64, 64), INT8, ROW, replace(SHORT, top_p=0.05, max_k=2))
    assert torch.equal(torch.rand(3), expected)


def test_randomized_vectors_span_the_leading_space():
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(80, 60, generator=generator), full_matrices=False)
    weight = left @ torch.diag(torch.logspace(2, -1, 60)) @ right
    u, v = top_singular_vectors(weight, top_p=0.1, min_k=1, max_k=99, full_matrix=False, generator=generator)
    full_u, full_v = top_singular_vectors(
        weight, top_p=0.1, min_k=1, max_k=99, full_matrix=True, generator=generator
    )
    assert u.shape == (80, 6)
    assert v.shape == (60, 6)
    torch.testing.assert_close(u @ u.T, full_u @ full_u.T, atol=1e-3, rtol=0)
    torch.testing.assert_close(v @ v.T, full_v @ full_v.T, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("top_p", "low", "high", "k"), [(0.5, 1, 99, 10), (0.01, 3, 99, 3), (1.0, 1, 7, 7), (1.0, 50, 99, 20)]
)
def test_how_many_singular_vectors(top_p, low, high, k):
    u, v = top_singular_vectors(
        torch.randn(20, 30),
        top_p=top_p,
        min_k=low,
        max_k=high,
        full_matrix=False,
        generator=torch.Generator(),
    )
    assert (u.shape, v.shape) == ((20, k), (30, k))


def test_gradients_and_curvature_match_autograd():
    error = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    left, _, right = torch.linalg.svd(torch.randn(6, 9, dtype=torch.float64), full_matrices=False)
    gram = gram_of(9)
    for objective, loss in (
        (ProjectedObjective(left[:, :3], right[:3].T), (left[:, :3].T @ error @ right[:3].T).square().sum()),
        (GramObjective(gram), ((error @ gram) * error).sum()),
    ):
        (expected,) = torch.autograd.grad(loss / 2, error, create_graph=True)
        measured, gradient = objective.evaluate(error.detach())
        torch.testing.assert_close(measured.square().sum(), loss.detach())
        torch.testing.assert_close(gradient, expected.detach())
        (second,) = torch.autograd.grad(expected[2, 4], error)
        assert objective.curvature().expand(6, 9)[2, 4] == pytest.approx(float(second[2, 4]))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
def test_following_a_change_is_evaluating_anew(share):
    generator = torch.Generator().manual_seed(0)
    objective = GramObjective(gram_of(80).float())
    before = torch.randn(50, 80, generator=generator)
    change = torch.randn(50, 80, generator=generator)
    change = change * (torch.rand(50, 80, generator=generator) < share)
    _, gradient = objective.evaluate(before)
    expected = objective.evaluate(before + change)
    for followed, exact in zip(objective.follow(before + change, gradient, change), expected, strict=True):
        torch.testing.assert_close(followed, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("optimizer", ["adamw", "radam"])
def test_steps_too_short_to_move_a_code_add_up(optimizer):
    weight, gram = heavy(64, 120), gram_of(120)
    options = replace(SHORT, optimizer=optimizer, schedule=ScheduleOptions(lr=1e-4))
    result = learn_rounding(weight, FP8_E4M3, ROW, options, gram=gram)
    assert result.loss < 0.7 * result.nearest_loss


def test_activation_scales_choose_a_scale_that_serves_the_strong_channels():
    weight = heavy(64, 100)
    strength = torch.logspace(2, -2, 100)
    plain = quantize_matrix(weight, INT8, ROW).dequantize()
    result = round_weight(weight, INT8, ROW, activation_scales=strength)

    def cost(dequantized):
        return float(((dequantized - weight).double() * strength.double()).square().sum())

    assert cost(result.quantized.dequantize()) < 0.8 * cost(plain)
    assert (result.loss / result.nearest_loss) ** 2 == pytest.approx(
        cost(result.quantized.dequantize()) / cost(plain), rel=1e-3
    )


def test_statistics_exclude_each_other():
    with pytest.raises(ConfigurationError, match="either"):
        round_weight(torch.ones(2, 2), INT8, ROW, activation_scales=torch.ones(2), gram=torch.eye(2))
    with pytest.raises(ConfigurationError, match="either"):
        learn_rounding(torch.ones(2, 2), INT8, ROW, channel_weights=torch.ones(2), gram=torch.eye(2))


@pytest.mark.parametrize("call", [learn_rounding, round_weight])
def test_not_finite_weights_are_refused(call):
    weight = torch.ones(4, 4)
    weight[1, 2] = float("nan")
    for quant_type in QUANT_TYPES.values():
        with pytest.raises(ValidationError, match="1 NaN"):
            call(weight, quant_type, ROW)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_iter": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_k": 0},
        {"min_k": 5, "max_k": 4},
        {"early_stop_stall": 0},
        {"early_stop_loss": -1.0},
        {"weight_price": -1.0},
        {"optimizer": "adam"},
    ],
)
def test_bad_rounding_options(bad):
    with pytest.raises(ConfigurationError):
        RoundingOptions(**bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": 0.0},
        {"lr_schedule": "cosine"},
        {"lr_factor": 1.0},
        {"lr_gamma": 0.0},
        {"lr_patience": -1},
        {"lr_shape_influence": 2.0},
        {"lr_max": -1.0},
    ],
)
def test_bad_schedules(bad):
    with pytest.raises(ConfigurationError):
        ScheduleOptions(**bad)


def rates(options: ScheduleOptions, outcomes: str, shape=(10, 10)) -> list[float]:
    schedule = Schedule(options, shape)
    out = []
    for outcome in outcomes:
        schedule.update(improved=outcome == "+")
        out.append(schedule.lr)
    return out


def test_exponential_shrinks_every_step():
    assert rates(ScheduleOptions("exponential", lr=1.0, lr_gamma=0.5), "+-+") == [0.5, 0.25, 0.125]


def test_plateau_waits_and_cools_down():
    options = ScheduleOptions("plateau", lr=1.0, lr_factor=0.5, lr_patience=1, lr_cooldown=2)
    assert rates(options, "+--+--") == [1, 1, 0.5, 0.5, 0.5, 0.5]
    assert rates(options, "------") == [1, 0.5, 0.5, 0.5, 0.5, 0.25]


def test_adaptive_grows_to_its_limit_and_shrinks():
    options = ScheduleOptions("adaptive", lr=0.8, lr_factor=0.5, lr_max=1.1)
    assert rates(options, "++-") == pytest.approx([1.0, 1.1, 0.55])


def test_shape_influence_damps_elongated_matrices_sooner():
    options = ScheduleOptions("plateau", lr=1.0, lr_factor=0.5, lr_shape_influence=1.0)
    assert rates(options, "-", (40, 10)) == [0.25]
    assert rates(options, "-", (10, 10)) == [0.5]
    assert rates(replace(options, lr_shape_influence=0.5), "-", (10, 40)) == [0.375]


@pytest.mark.parametrize("schedule", ["adaptive", "plateau", "exponential"])
def test_every_schedule_lowers_the_loss(schedule):
    options = replace(SHORT, schedule=ScheduleOptions(schedule, lr=0.3))
    result = learn_rounding(heavy(96, 96), INT8, ROW, options)
    assert result.loss < 0.7 * result.nearest_loss


def test_early_stops_stop_early():
    weight = heavy(96, 96)
    base = RoundingOptions(num_iter=200, top_p=0.1, max_k=8, early_stop_loss=0.0, weight_price=0.0)
    runs = {
        "loss": replace(base, early_stop_loss=0.5),
        "stall": replace(base, early_stop_stall=1),
        "lr": replace(
            base, early_stop_lr=0.02, schedule=ScheduleOptions("exponential", lr=0.1, lr_gamma=0.5)
        ),
    }
    long = learn_rounding(weight, INT8, ROW, base)
    for name, options in runs.items():
        assert learn_rounding(weight, INT8, ROW, options).iterations < long.iterations, name
    result = learn_rounding(weight, INT8, ROW, runs["loss"])
    assert result.loss <= 0.5 * result.nearest_loss
    assert learn_rounding(weight, INT8, ROW, runs["lr"]).iterations == 3


def test_missing_prodigy_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("prodigyplus"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for module in [m for m in sys.modules if m.startswith("prodigyplus")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(DependencyError) as caught:
        update_rule("ppsf")
    assert "pip install prodigy-plus-schedule-free" in (caught.value.hint or "")
