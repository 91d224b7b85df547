"""quantize: what it changes, what it leaves alone, and what each setting is worth."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from qwodel.exceptions import CalibrationError, ValidationError
from qwodel.modeling.observe.rows import RowSampler
from qwodel.modules.quantized_conv import QuantizedConv
from qwodel.modules.segment_linear import SegmentLinear
from qwodel.segquant import quantize, quantize_model
from qwodel.segquant.batches import calls_of
from tests.segquant.toys import Block, batches, outputs, sqnr, toy

DATA, HELD = batches(12), batches(4, seed=2)
PLAIN: dict[str, Any] = {"opt": {"type": "default"}, "seglinear": False, "input_quant": {"dual_scale": False}}
INT4 = {
    "weight_quant": {"type": "int4", "axis": 1},
    "input_quant": {"type": "int8", "axis": -1, "dynamic": True},
}


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    return outputs(toy(), HELD)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quality(exact: torch.Tensor, **settings: Any) -> float:
    model = quantize(toy(), DATA, {"default": settings})
    return sqnr(outputs(model, HELD), exact)


def test_the_model_is_changed_in_place_and_the_data_is_not(exact: torch.Tensor) -> None:
    model, given = toy(), deepcopy(DATA)
    model.train()
    assert quantize(model, given, {"default": {"calib": {"type": "gptq"}}}) is model
    assert model.training
    for before, after in zip(DATA, given, strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert not linear
    assert isinstance(model.stem, nn.Conv2d)
    assert 25 < sqnr(outputs(model, HELD), exact) < 70


def test_a_copy_by_option() -> None:
    model = toy()
    copy = quantize(model, DATA, inplace=False)
    assert copy is not model
    assert torch.equal(outputs(model, HELD), outputs(toy(), HELD))


@pytest.mark.parametrize("per_layer_mode", [False, True])
def test_a_run_that_ends_midway_leaves_the_model_as_it_was(per_layer_mode: bool) -> None:
    model = toy()

    def stop(done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, DATA, per_layer_mode=per_layer_mode, on_layer=stop)
    assert torch.equal(outputs(model, HELD), outputs(toy(), HELD))


def test_optima_and_calibrations_are_worth_it(exact: torch.Tensor) -> None:
    plain = quality(exact, **PLAIN)
    seams = quality(exact, opt={"type": "default"})
    smooth = quality(exact, opt={"type": "smooth", "search_alpha_config": {}})
    svd = quality(
        exact, opt={"type": "svd", "low_rank": 4, "search_alpha_config": {}}, calib={"type": "gptq"}
    )
    assert seams > plain
    assert smooth > plain + 3
    assert svd > smooth


def test_four_bit_weights_gain_by_gptq_and_branches(exact: torch.Tensor) -> None:
    plain = quality(exact, **PLAIN | INT4)
    solved = quality(exact, **INT4, opt={"type": "default"}, calib={"type": "gptq"})
    svd = quality(
        exact, **INT4, opt={"type": "svd", "low_rank": 8, "search_alpha_config": {}},
        calib={"type": "gptq", "search_range": True},
    )  # fmt: skip
    assert solved > plain + 1
    assert svd > plain + 6


def test_groups_of_columns(exact: torch.Tensor) -> None:
    calib = {"type": "gptq", "groupsize": 8, "actorder": True, "blocksize": 16, "cpu_storage": True}
    config = {"default": {**INT4, "opt": {"type": "default"}, "calib": calib}}
    model = quantize(toy(), DATA, config)
    weight = model.blocks[0].q.products()[0].weight
    assert weight.scale.shape == (32, 4)
    assert sqnr(outputs(model, HELD), exact) > quality(
        exact, **INT4, opt={"type": "default"}, calib={"type": "gptq"}
    )


@pytest.mark.parametrize(
    ("inputs", "weights", "low"),
    [
        ({"type": "int16", "dynamic": True}, {"type": "int16"}, 70),
        ({"type": "int6"}, {"type": "int6", "axis": 1}, 20),
        ({"type": "int4", "dynamic": True, "axis": -1}, {"type": "int4", "axis": 1}, 8),
        ({"type": "fpe4m3"}, {"type": "fpe4m3", "axis": 1}, 25),
        ({"type": "fpe5m2", "dynamic": True}, {"type": "fpe5m2"}, 18),
        ({"type": "bf16"}, {"type": "int8", "axis": 1}, 40),
        ({"type": "int8", "symmetric": False}, {"type": "int8", "axis": -1, "symmetric": False}, 28),
        ({"type": "fp16"}, {"type": "fp16"}, 60),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_every_number_format_executes_as_it_is_simulated(
    exact: torch.Tensor, inputs: dict[str, Any], weights: dict[str, Any], low: float
) -> None:
    config = {"default": {"input_quant": inputs, "weight_quant": weights, "conv": True, "opt": {"type": "svd", "low_rank": 4, "iterations": 0}}}  # fmt: skip
    config["default"]["real_quant"] = True
    model = quantize(toy(), DATA, config)
    for name, layer in model.named_modules():
        if isinstance(layer, SegmentLinear | QuantizedConv):
            assert layer.real
            x = (
                torch.randn(3, 4, 6, 6)
                if isinstance(layer, QuantizedConv)
                else torch.randn(5, layer.in_features)
            )
            with torch.no_grad():
                found = layer(x)
                layer.real = False
                expected = layer(x)
            assert float((found - expected).norm() / expected.norm()) < 1e-5, name
    assert sqnr(outputs(model, HELD), exact) > low


def test_dual_scales_follow_what_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    model.requires_grad_(False)
    model[0].weight.mul_(3)
    given = [(torch.randn(32, 64),) for _ in range(8)]
    held = torch.randn(256, 64)
    exact = model[:3](held)
    errors = {}
    for label, signs in {"one": {"dual_scale": False}, "dual": {"symmetric": True}, "any": {}}.items():
        report = quantize_model(
            copy := deepcopy(model), given,
            {"0": {"enable": False}, "default": {"opt": {"type": "default"}, "input_quant": signs, "weight_quant": {"type": "int8", "axis": 1}}},
        )  # fmt: skip
        errors[label] = sqnr(copy[:3](held), exact)
        how = {each.name: each.how for each in report.layers}
        assert "dual" not in how["4"]  # Tanh is even: one scale
        assert ("dual" in how["2"]) is (label == "dual")
    assert errors["dual"] > errors["one"] + 2
    assert errors["any"] > errors["dual"]


def test_smoothing_goes_into_norms_values_and_gates(exact: torch.Tensor) -> None:
    model = toy()
    report = quantize_model(model, DATA, {"default": {"opt": {"type": "smooth", "keep_best": False}}})
    assert {"blocks.0.q", "blocks.0.k", "blocks.0.v", "blocks.0.o", "blocks.0.up", "blocks.0.down"} <= set(
        report.folded
    )
    assert "blocks.0.modulation" not in report.folded
    block = model.blocks[0]
    assert isinstance(block, Block)
    assert not torch.equal(block.norm1.weight, toy().blocks[0].norm1.weight)
    for name in report.folded:
        assert all(part.smoothing is None for part in model.get_submodule(name).products())
    assert sqnr(outputs(model, HELD), exact) > 25


def test_a_norm_that_somebody_else_reads_keeps_its_weight() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            return h + self.linear(h)

    torch.manual_seed(0)
    model = nn.Sequential(Leaky()).requires_grad_(False)
    report = quantize_model(model, [torch.randn(8, 16) * torch.logspace(0, 1, 16)], {"default": {"opt": {"type": "smooth", "keep_best": False}}})  # fmt: skip
    assert report.folded == []
    assert torch.equal(model[0].norm.weight, torch.ones(16))


def test_gptq_keeps_nearest_where_it_overfits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 96), nn.Identity()).requires_grad_(False)
    few = [(torch.randn(3, 96),) for _ in range(4)]
    config = {"default": {**INT4, "opt": {"type": "default"}, "calib": {"type": "gptq", "percdamp": 1e-6}}}
    held = torch.randn(512, 96)
    exact = model(held)
    guarded = quantize(deepcopy(model), few, config)
    config["default"]["opt"]["keep_best"] = False
    forced = quantize(deepcopy(model), few, config)
    config["default"]["calib"] = {"type": "amax"}
    nearest = quantize(deepcopy(model), few, config)
    assert sqnr(forced(held), exact) < sqnr(nearest(held), exact) - 0.5
    assert sqnr(guarded(held), exact) >= sqnr(nearest(held), exact) - 1e-3


def test_layer_by_layer_gives_much_the_same_with_bounded_memory(exact: torch.Tensor) -> None:
    held: list[int] = []
    add = RowSampler.add

    def watching(self: RowSampler, rows: torch.Tensor) -> None:
        add(self, rows)
        held.append(self.live_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowSampler, "add", watching)
        model = quantize(toy(), batches(24, size=24), {"default": {}}, per_layer_mode=True)
    # 4096 rows in fp32, at most 64 channels, and one batch's rounding up; all inputs would be 20736 rows.
    assert max(held) <= 4 * 64 * (4096 + 24)
    assert sqnr(outputs(model, HELD), exact) > 25
    together = quantize(toy(), DATA, {"default": {}})
    alone = quantize(toy(), DATA, {"default": {}}, per_layer_mode=True)
    assert torch.equal(outputs(together, HELD), outputs(alone, HELD))


def test_names_choose_settings_and_verbose_prints_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    config = {"*.q": {"enable": False}, "head": {"weight_quant": {"type": "int4", "axis": 1}}, "default": {}}
    model = quantize(toy(), DATA, config, verbose=True)
    assert isinstance(model.blocks[0].q, nn.Linear)
    assert model.head.products()[0].weight.quant_type.name == "int4"
    printed = capsys.readouterr().out
    assert "blocks.0.modulation" in printed
    assert "linear2chunk" in printed
    assert "blocks.1.q" in printed
    assert "kept: enable is off" in printed


def test_layers_that_run_twice_are_calibrated_on_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(100 * self.linear(x))

    torch.manual_seed(0)
    model = Twice().requires_grad_(False)
    given = [(torch.randn(16, 8),) for _ in range(4)]
    old = deepcopy(model.linear)
    report = quantize_model(model, given, {"default": {"opt": {"type": "default"}}})
    assert [each.name for each in report.layers] == ["linear"]
    assert report.kept == {"unused": "the model does not call it"}
    inputs = model.linear.products()[0].inputs
    second = max(float((100 * old(x)).abs().max()) for (x,) in given)
    assert float(inputs.scale) * 127 == pytest.approx(second, rel=1e-5)


def test_batches_come_in_many_shapes() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    call = ((x,), {"y": y})
    assert calls_of([x, (x, y), {"x": x}, call, [(x, y)], [{"x": x}]]) == [
        ((x,), {}), ((x, y), {}), ((), {"x": x}), call, ((x, y), {}), ((), {"x": x}),
    ]  # fmt: skip
    with pytest.raises(CalibrationError, match="no batches"):
        calls_of([])
    with pytest.raises(CalibrationError, match="is a int"):
        calls_of([3])


def test_what_cannot_be_quantized_is_said() -> None:
    with pytest.raises(ValidationError, match="does not run on the calibration data"):
        quantize(toy(), [(torch.zeros(2, 4, 6, 6),)])
    with pytest.raises(ValidationError, match="nothing is quantized"):
        quantize(toy(), DATA, {"default": {"enable": False}})
    with pytest.raises(ValidationError, match="a single layer"):
        quantize(nn.Linear(4, 4), [torch.zeros(1, 4)])
    bad = batches(2)
    bad[0]["image"][0, 0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="join hold NaN"):
        quantize(toy(), bad)
    model = toy()
    with pytest.raises(CalibrationError):
        quantize(model, bad)
    assert torch.equal(outputs(model, HELD), outputs(toy(), HELD))
