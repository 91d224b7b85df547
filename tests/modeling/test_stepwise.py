from __future__ import annotations

import pytest
import torch
from torch import nn

from qwodel.modeling.model_blocks import find_units
from qwodel.modeling.observe.layers import is_fused_experts, is_linear
from qwodel.modeling.stepwise import run_in_step

from .tiny_models import ARCHITECTURES, batches, make


def units_of(model):
    return find_units(model, [each for each in model.modules() if is_linear(each) or is_fused_experts(each)])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_unit_sees_what_it_sees_in_a_plain_pass(name):
    model, data = make(name), batches(name)
    units = units_of(model)
    expected: dict[nn.Module, list[torch.Tensor]] = {}

    def remember(unit, _, output):
        expected.setdefault(unit, []).append(output[0] if isinstance(output, tuple) else output)

    hooks = [unit.register_forward_hook(remember) for unit in units]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for hook in hooks:
        hook.remove()
    visited: dict[nn.Module, list[torch.Tensor]] = {}

    def visit(unit, arrivals):
        for arrival in arrivals:
            assert arrival.unit is unit
            output = unit(*arrival.args, **arrival.kwargs)
            visited.setdefault(unit, []).append(output[0] if isinstance(output, tuple) else output)
            yield output

    with torch.no_grad():
        run_in_step(lambda batch: model(**batch), data, units, visit)
    assert visited.keys() == expected.keys()
    for unit, outputs in expected.items():
        # The plain pass goes batch by batch, ours visit by visit.
        visits = len(outputs) // len(data)
        if name == "albert":
            visited[unit] = visited[unit][: len(data)]
            outputs = outputs[::visits]
        for ours, theirs in zip(visited[unit], outputs, strict=True):
            assert torch.equal(ours, theirs)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.unused = nn.ModuleList([nn.Linear(4, 4)])
        self.after = []

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        self.after.append(x)
        return x


def identity(unit, arrivals):
    for arrival in arrivals:
        yield unit(*arrival.args)


def test_all_batches_pass_a_unit_before_the_next_and_nothing_runs_after_the_last():
    chain, seen = Chain(), []

    def visit(unit, arrivals):
        seen.append((unit, len(arrivals)))
        yield from identity(unit, arrivals)

    run_in_step(chain, [torch.ones(1, 4)] * 5, list(chain.blocks), visit)
    assert seen == [(block, 5) for block in chain.blocks]
    assert chain.after == []


def test_a_pass_that_never_meets_a_unit_runs_to_its_end():
    chain, seen = Chain(), []

    def visit(unit, arrivals):
        seen.append(unit)
        yield from identity(unit, arrivals)

    run_in_step(chain, [torch.ones(1, 4)] * 2, [*chain.blocks, chain.unused[0]], visit)
    assert seen == list(chain.blocks)
    assert len(chain.after) == 2


@pytest.mark.parametrize("where", ["model", "visit"])
def test_failures_surface_and_end_every_pass(where):
    chain, ended = Chain(), []

    def forward(x):
        try:
            chain(x)
            raise ValueError("in the model")
        finally:
            ended.append(x)

    def visit(unit, arrivals):
        if where == "visit" and unit is chain.blocks[1]:
            raise ValueError("in the visit")
        yield from identity(unit, arrivals)

    units = [*chain.blocks, chain.unused[0]]
    with pytest.raises(ValueError, match=f"in the {where}"):
        run_in_step(forward, [torch.ones(1, 4)] * 3, units, visit)
    assert len(ended) == 3
    assert all("forward" not in vars(unit) for unit in units)


def test_a_visit_may_run_in_step_through_layers_of_its_own():
    model, order = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))), []
    inputs, outputs = [torch.ones(1, 4), -torch.ones(1, 4)], []
    expected = [model(each) for each in inputs]

    def through(layer, arrivals):
        order.append((layer, len(arrivals)))
        for each in arrivals:
            yield layer.forward(*each.args)

    def visit(unit, arrivals):
        done = []
        run_in_step(lambda each: done.append(unit(*each.args)), arrivals, list(unit), through, finish=True)
        yield from done

    run_in_step(lambda x: outputs.append(model(x)), inputs, list(model), visit, finish=True)
    assert order == [(layer, 2) for unit in model for layer in unit]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


def test_lists_in_lists_are_units_inside():
    model = nn.ModuleDict({"stages": nn.ModuleList([nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])])})
    head = nn.Linear(2, 2)
    model["head"] = head
    units = find_units(model, [model["stages"][0][0][0], head])
    assert units == [model["stages"][0][0], head]
