from __future__ import annotations

import pytest
import torch
from torch import nn

from qwodel.algorithms.gram import GramAccumulator
from qwodel.exceptions import ValidationError
from qwodel.modeling.observe.gram import GramSums
from qwodel.modeling.observe.layers import is_fused_experts, is_linear
from qwodel.modeling.observe.peaks import GreatestValues, TokenSamples
from qwodel.modeling.observe.rows import RowSampler, RowSamples
from qwodel.modeling.observe.watcher import Watcher

from .tiny_models import ARCHITECTURES, batches, make


def layers_of(model):
    return {n: m for n, m in model.named_modules() if is_linear(m) or is_fused_experts(m)}


def record(model, data):
    sums = GramSums()
    with Watcher(layers_of(model), sums, experts_apart=True) as watcher, torch.no_grad():
        for batch in data:
            model(**batch)
            watcher.batch()
    return sums


def plain_inputs(model, data):
    """Every linear layer's inputs in fp64, by hooks of the test's own."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2).double())
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(each) for name, each in seen.items()}


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in ("mixtral", "qwen3-moe")])
def test_statistics_are_those_of_the_inputs(name):
    model, data = make(name), batches(name)
    groups = record(model, data).groups()
    expected = plain_inputs(model, data)
    covered = set()
    for group in groups:
        result = group.sums.result()
        for parameter, expert in group.layers:
            assert expert is None
            layer = parameter.removesuffix(".weight")
            inputs = expected[layer]
            covered.add(layer)
            assert result.count == len(inputs)
            assert torch.allclose(result.gram, inputs.T @ inputs / len(inputs), rtol=1e-5, atol=1e-7)
            assert torch.equal(result.channel_max, inputs.abs().amax(dim=0).float())
            assert torch.allclose(result.mean, inputs.mean(dim=0).float(), atol=1e-6)
    assert covered == expected.keys()


def test_layers_with_the_same_input_share_one_sum():
    groups = record(make("llama"), batches("llama")).groups()
    shared = [sorted(parameter.split(".")[-2] for parameter, _ in group.layers) for group in groups[:4]]
    assert shared == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_see_the_tokens_that_are_routed_to_them(name):
    model, data = make(name), batches(name)
    groups = record(model, data).groups()
    found = {layer: group.sums.result() for group in groups for layer in group.layers}
    experts = model.model.layers[1].mlp.experts
    calls = []
    hook = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    hook.remove()
    total = 0
    for expert in range(4):
        rows = torch.cat([hidden[(top == expert).any(dim=1)] for hidden, top, _ in calls]).double()
        total += len(rows)
        statistics = found["model.layers.1.mlp.experts.gate_up_proj", expert]
        assert statistics.count == len(rows)
        assert torch.allclose(statistics.gram, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-7)
        gate, up = (rows @ experts.gate_up_proj[expert].double().T).chunk(2, dim=1)
        inner = nn.functional.silu(gate) * up
        statistics = found["model.layers.1.mlp.experts.down_proj", expert]
        assert torch.allclose(statistics.gram, inner.T @ inner / len(rows), rtol=1e-4, atol=1e-6)
    assert total == 2 * sum(batch["input_ids"].numel() for batch in data)


def test_a_layer_that_stops_sharing_goes_on_alone():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x, apart):
            return self.a(x), self.b(x + 1 if apart else x)

    model, x = Two(), torch.randn(5, 3, dtype=torch.float64)
    sums = GramSums()
    with Watcher({"a": model.a, "b": model.b}, sums) as watcher, torch.no_grad():
        model(x.float(), False)
        watcher.batch()
        assert len(sums.groups()) == 1
        with torch.no_grad():
            model.b(x.float() + 1)
    a, b = sums.groups()
    assert a.layers == [("a.weight", None)]
    assert torch.allclose(a.sums.result().mean.double(), x.mean(dim=0), atol=1e-6)
    assert torch.allclose(b.sums.result().mean.double(), x.mean(dim=0) + 0.5, atol=1e-6)


def test_an_input_changed_in_place_is_another_input():
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.ones(4, 3)
    sums = GramSums()
    with Watcher({"a": a, "b": b}, sums), torch.no_grad():
        a(x)
        x.mul_(5)
        b(x)
    means = [float(group.sums.result().mean[0]) for group in sums.groups()]
    assert means == [1.0, 5.0]


def test_inputs_that_are_not_finite_name_the_layer():
    layer = nn.Linear(3, 2)
    with (
        Watcher({"block.fc": layer}, GramSums()),
        pytest.raises(ValidationError, match=r"block\.fc\.weight: .*NaN or Inf"),
    ):
        layer(torch.tensor([[1.0, float("nan"), 0.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_do_not_drift(dtype):
    """Ten thousand batches of equal inputs: the mean of their products is exact to single precision."""
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    sums = GramAccumulator(5)
    for _ in range(10_000):
        sums.add(x)
    exact = x.double().T @ x.double() / 8
    assert torch.allclose(sums.result().gram, exact, rtol=2e-6, atol=1e-7)


def test_products_of_bf16_inputs_are_exact_on_every_cpu():
    x = (torch.randn(2048, 96, generator=torch.Generator().manual_seed(1)) * 3).bfloat16()
    sums = GramAccumulator(96)
    sums.add(x)
    exact = x.double().T @ x.double() / 2048
    assert float((sums.result().gram - exact).abs().max() / exact.diagonal().max()) < 1e-5


def test_a_given_buffer_is_summed_in():
    buffer = torch.zeros(4, 4, dtype=torch.float32)
    sums = GramAccumulator(4, buffer=buffer)
    sums.add(torch.eye(4))
    assert torch.equal(buffer, torch.eye(4))
    with pytest.raises(ValidationError, match="width 5"):
        sums.add(torch.ones(2, 5))


def test_nothing_seen_is_an_error():
    with pytest.raises(ValidationError, match="no inputs"):
        GramAccumulator(4).result()


def test_no_token_counts_for_more_than_the_median_one():
    layer = torch.nn.Linear(6, 3)
    inputs = torch.randn(2, 5, 6)
    inputs[0, 0] *= 1000
    sums = GramSums(even=True)
    with Watcher({"layer": layer}, sums) as watcher, torch.no_grad():
        layer(inputs)
        watcher.batch()
    (group,) = sums.groups()
    rows = inputs.reshape(-1, 6).double()
    lengths = rows.norm(dim=1, keepdim=True)
    rows = rows * (lengths.median() / lengths).clamp(max=1)
    assert torch.allclose(group.sums.result().gram.double(), rows.T @ rows / 10, rtol=1e-5)


class Named(nn.Module):
    """Two layers that read the same tensor, the second by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(input=x)


def test_one_watcher_hands_the_same_inputs_to_all_sinks() -> None:
    model, x = Named(), torch.randn(2, 5, 3)
    sums, peaks, samples = GramSums(), GreatestValues(names={"b": ("b", "b.too")}), TokenSamples(4)
    sampler = RowSampler("a", 1, 10)
    rows = RowSamples({"a": sampler, "b": RowSampler("b", 1, 10)}, lambda _, inputs: inputs.flatten(0, -2))
    with Watcher({"a": model.a, "b": model.b}, sums, peaks, samples, rows), torch.no_grad():
        model(x)
    model(torch.full((1, 1, 3), 99.0))  # nobody watches any more
    flat = x.flatten(0, 1)
    (group,) = sums.groups()
    assert group.sums.count == 10
    assert set(peaks.peaks) == {"a", "b", "b.too"}
    assert all(torch.equal(each, flat.abs().amax(dim=0)) for each in peaks.peaks.values())
    found = samples.result()
    assert found["a"] is found["b"]
    assert torch.equal(found["a"], flat[[0, 3, 6, 9]])
    assert torch.equal(rows.result()["b"].low, flat.amin(dim=0))


@pytest.mark.parametrize("flat", [False, True])
def test_padding_does_not_count_where_a_sink_heeds_the_mask(flat: bool) -> None:
    layer, x = nn.Linear(3, 2), torch.rand(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    x[mask == 0] = 50
    peaks, samples = GreatestValues(), TokenSamples(100)
    with Watcher({"layer": layer}, peaks, samples) as watcher, torch.no_grad():
        watcher.batch(mask)
        layer(x.flatten(0, 1) if flat else x)
    assert torch.equal(peaks.peaks["layer"], x[mask != 0].amax(dim=0))
    assert torch.equal(samples.result()["layer"], x[mask != 0])


def test_what_is_no_tensor_names_the_layer() -> None:
    layer = nn.Linear(3, 2)
    with (
        Watcher({"fc": layer}, GreatestValues()),
        pytest.raises(ValidationError, match="fc is called with a list"),
    ):
        layer([1.0])
