"""Each pattern in hand-written modules, in every spelling, by each way of reading the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from qwodel.exceptions import ValidationError
from qwodel.modeling.patterns import Finding, Patterns, SegPattern, find, find_patterns

METHODS = ("torch.export", "hooks")
CHUNK, SPLIT = SegPattern.LINEAR2CHUNK, SegPattern.LINEAR2SPLIT
CONCAT, STACK, RESHAPE = SegPattern.CONCAT2LINEAR, SegPattern.STACK2LINEAR, SegPattern.RESHAPE2LINEAR
ACTIVATION = SegPattern.ACTIVATION2LINEAR


class Around(nn.Module):
    """Two linear layers, 12 → 12, and what a case does with them."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.last = nn.Linear(12, 12)
        self.table = nn.Parameter(torch.ones(6, 2))
        self.drop = nn.Dropout(0.5)
        self.case = forward

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.case(self, *inputs)


X = torch.randn(2, 3, 12)


def _sum(parts: Any) -> Any:
    return sum(part.mean(-1) for part in parts)


def _turned(q: torch.Tensor) -> torch.Tensor:
    return torch.cat((-q[..., 3:], q[..., :3]), -1)


def _rotary(m: Any, x: torch.Tensor) -> Any:
    q = m.first(x).view(2, 3, 2, 6).transpose(1, 2)
    return q * 0.5 + _turned(q) * 0.5


OUTPUTS: dict[str, tuple[Callable[..., Any], SegPattern | None, tuple[int, ...]]] = {
    "positional dim": (lambda m, x: _sum(m.first(x).chunk(3, -1)), CHUNK, (4, 4, 4)),
    "keyword dim": (lambda m, x: _sum(torch.chunk(m.first(x), chunks=2, dim=2)), CHUNK, (6, 6)),
    "uneven chunks": (lambda m, x: _sum(m.first(x).chunk(5, dim=-1)), CHUNK, (3, 3, 3, 3)),
    "split by size": (lambda m, x: _sum(m.first(x).split(5, 2)), SPLIT, (5, 5, 2)),
    "split by list": (lambda m, x: _sum(torch.split(m.first(x), [7, 1, 4], dim=-1)), SPLIT, (7, 1, 4)),
    "split of one batch entry": (lambda m, x: _sum(m.first(x)[:1].split((3, 9), -1)), SPLIT, (3, 9)),
    "tensor_split": (lambda m, x: _sum(m.first(x).tensor_split((2, 5), dim=-1)), SPLIT, (2, 3, 7)),
    "slices": (lambda m, x: m.first(x)[..., :8].mean() + m.first(x)[..., 8:].mean(), SPLIT, (8, 4)),
    "slices of one value": (
        lambda m, x: (lambda y: y[:, :, :8].mean() + y[:, :, 8:].mean())(m.first(x)),
        SPLIT,
        (8, 4),
    ),
    "one slice": (lambda m, x: m.first(x)[..., 3:], SPLIT, (3, 9)),
    "narrow": (lambda m, x: m.first(x).narrow(-1, 2, 4), SPLIT, (2, 4, 6)),
    "after a cast": (lambda m, x: _sum(m.first(x).to(torch.float64).chunk(2, -1)), CHUNK, (6, 6)),
    "after dropout": (
        lambda m, x: _sum(functional.dropout(m.drop(m.first(x)), 0.1).chunk(2, -1)),
        CHUNK,
        (6, 6),
    ),
    "after unsqueeze": (lambda m, x: _sum(m.first(x).unsqueeze(1).chunk(2, dim=3)), CHUNK, (6, 6)),
    "after an activation": (lambda m, x: _sum(functional.silu(m.first(x)).chunk(2, -1)), CHUNK, (6, 6)),
    "after a permutation": (lambda m, x: _sum(m.first(x).permute(2, 0, 1).chunk(3, 0)), CHUNK, (4, 4, 4)),
    "nested": (lambda m, x: _sum(m.first(x).chunk(2, -1)[1].chunk(2, -1)), CHUNK, (6, 3, 3)),
    "view and unbind": (lambda m, x: _sum(m.first(x).view(2, 3, 3, 4).unbind(2)), CHUNK, (4, 4, 4)),
    "fused heads": (
        lambda m, x: _sum(m.first(x).view(2, 3, 2, 6).transpose(1, 2).chunk(3, -1)),
        CHUNK,
        (2, 2, 2, 2, 2, 2),
    ),
    "table added": (
        lambda m, x: _sum((m.first(x[:, 0]).view(2, 6, 2) + m.table).chunk(3, 1)),
        CHUNK,
        (4, 4, 4),
    ),
    "glu": (lambda m, x: functional.glu(m.first(x), -1), CHUNK, (6, 6)),
    "of the batch": (lambda m, x: _sum(m.first(x).chunk(2, 0)), None, ()),
    "of the tokens": (lambda m, x: m.first(x)[:, 1:], None, ()),
    "read across": (lambda m, x: (lambda y: _sum(y.chunk(2, -1)) + y.mean(-1))(m.first(x)), None, ()),
    "rotary halves": (_rotary, None, ()),
    "pairs": (lambda m, x: _sum(m.first(x).unflatten(-1, (-1, 2)).unbind(-1)), None, ()),
    "after a norm": (lambda m, x: _sum(functional.layer_norm(m.first(x), (12,)).chunk(2, -1)), None, ()),
}

Y, Z = torch.randn(2, 3, 4), torch.randn(2, 3, 8)
INPUTS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], SegPattern | None, Any]] = {
    "cat of inputs": (lambda m, a, b: m.last(torch.cat([a, b], -1)), (Y, Z), CONCAT, (4, 8)),
    "keyword dim": (lambda m, a, b: m.last(torch.cat((b, a), dim=2)), (Y, Z), CONCAT, (8, 4)),
    "of three": (lambda m, a: m.last(torch.cat([a, 2 * a, a.exp()], -1)), (Y,), CONCAT, (4, 4, 4)),
    "then dropout and a cast": (
        lambda m, a, b: m.last(m.drop(torch.cat([a, b], -1)).double().float()),
        (Y, Z),
        CONCAT,
        (4, 8),
    ),
    "then a slice": (lambda m, a, b: m.last(torch.cat([a, b], -1)[:, 1:]), (Y, Z), CONCAT, (4, 8)),
    "then elementwise": (
        lambda m, a, b: m.last(2 * torch.cat([a, b], -1).tanh() + 1),
        (Y, Z),
        CONCAT,
        (4, 8),
    ),
    "then a norm": (
        lambda m, a, b: m.last(functional.layer_norm(torch.cat([a, b], -1), (12,))),
        (Y, Z),
        None,
        (),
    ),
    "before a permutation": (
        lambda m, a, b: m.last(torch.cat([a.mT, b.mT], 1).transpose(1, 2)),
        (Y, Z),
        CONCAT,
        (4, 8),
    ),
    "of tokens": (lambda m, x: m.last(torch.cat([x, x], 1)), (X,), None, ()),
    "nested cat": (
        lambda m, a: m.last(torch.cat([torch.cat([a, a], -1).neg(), a], -1)),
        (Y,),
        CONCAT,
        [(8, 4), (4, 4, 4)],
    ),
    "stack": (lambda m, a: m.last(torch.stack([a, a, a], 2).flatten(2)), (Y,), STACK, (4, 4, 4)),
    "stack in front": (
        lambda m, a: m.last(torch.stack((a, a, a)).permute(1, 2, 0, 3).reshape(2, 3, 12)),
        (Y,),
        STACK,
        (4, 4, 4),
    ),
    "stack of last": (lambda m, a: m.last(torch.stack([a, a, a], dim=-1).flatten(2)), (Y,), None, ()),
    "heads": (
        lambda m, a: m.last(
            functional.scaled_dot_product_attention(a, a, a).transpose(1, 2).reshape(2, 3, 12)
        ),
        (torch.randn(2, 3, 3, 4),),
        RESHAPE,
        (4, 4, 4),
    ),
    "heads, flattened, cast, cut by token": (
        lambda m, a: m.last(a.exp().flatten(2, 3).to(torch.float32)[:, :2]),
        (torch.randn(2, 3, 2, 6),),
        RESHAPE,
        (6, 6),
    ),
    "a map": (lambda m, a: m.last(a.flatten(1)), (torch.randn(2, 3, 2, 2),), RESHAPE, (4, 4, 4)),
    "same row": (lambda m, a: m.last(a.reshape(-1, 12)), (X,), None, ()),
}

W = torch.randn(2, 3, 24)
ACTIVATIONS: dict[str, tuple[Callable[..., Any], torch.Tensor, str]] = {
    "silu": (lambda m, x: m.last(functional.silu(x)), X, "silu"),
    "silu, written out": (lambda m, x: m.last(x * torch.sigmoid(x)), X, "silu"),
    "quick gelu": (lambda m, x: m.last(x * torch.sigmoid(1.702 * x)), X, "quick_gelu"),
    "gelu": (lambda m, x: m.last(m.drop(functional.gelu(x, approximate="tanh")).double().float()), X, "gelu"),
    "gelu, written out": (
        lambda m, x: m.last(0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.04 * torch.pow(x, 3.0))))),
        X,
        "gelu",
    ),
    "relu, cut by token": (lambda m, x: m.last(torch.relu(x)[:, :1]), X, "relu"),
    "squared relu": (lambda m, x: m.last(functional.relu(x).square()), X, "relu"),
    "swiglu": (lambda m, x: m.last(functional.silu(x[..., :12]) * x[..., 12:]), W, "swiglu"),
    "geglu": (lambda m, x: m.last((lambda a, b: a * functional.gelu(b))(*x.chunk(2, dim=-1))), W, "geglu"),
    "glu": (lambda m, x: m.last(functional.glu(x)), W, "glu"),
    "of some inputs": (
        lambda m, x: m.last(torch.cat([x[..., :5], functional.gelu(x[..., 5:])], -1)),
        X,
        "gelu (inputs 5 to 11)",
    ),
    "behind a norm": (lambda m, x: m.last(functional.layer_norm(functional.silu(x), (12,))), X, ""),
    "behind a sum": (lambda m, x: m.last(functional.silu(x) + x), X, ""),
}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Leave one way of reading the graph."""
    monkeypatch.setattr(find, "_METHODS", {request.param: find._METHODS[request.param]})
    return str(request.param)


@pytest.mark.parametrize("case", OUTPUTS)
def test_cuts_of_outputs(case: str, method: str) -> None:
    forward, pattern, sizes = OUTPUTS[case]
    found = find_patterns(Around(forward), (X,))
    assert found.method == method
    assert [(each.pattern, each.sizes) for each in found.findings] == ([(pattern, sizes)] if pattern else [])
    assert found.output_segments() == ({"first": sizes} if pattern else {})
    assert found.input_segments() == {}


@pytest.mark.parametrize("case", INPUTS)
def test_joins_of_inputs(case: str, method: str) -> None:
    forward, inputs, pattern, sizes = INPUTS[case]
    found = find_patterns(Around(forward), inputs)
    several = sizes if isinstance(sizes, list) else [sizes]
    assert [(each.layer, each.pattern, each.sizes) for each in found.findings] == (
        [("last", pattern, each) for each in several] if pattern else []
    )
    assert found.input_segments() == ({"last": several[-1]} if pattern else {})


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activations_that_feed(case: str, method: str) -> None:
    forward, x, name = ACTIVATIONS[case]
    found = find_patterns(Around(forward), (x,), [SegPattern.ACTIVATION2LINEAR])
    assert found.activations() == ({"last": name} if name else {})


class Traceable(nn.Module):
    """What torch.fx can trace, with layers as modules and as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.gate, self.joined, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.act = nn.GELU()
        self.down = nn.Linear(6, 12)
        self.drop = nn.Dropout()

    def forward(self, x: torch.Tensor, flag: bool = True) -> torch.Tensor:
        a, b, c = torch.split(self.cut(x).float(), [2, 4, 6], dim=-1)
        x = self.joined(torch.cat((a, b, self.drop(c)), dim=-1)) if flag else x
        left, right = self.gate(x).chunk(2, 2)
        x = self.down(left * self.act(right))
        return self.out(x.view(2, 3, 2, 6).transpose(1, 2).exp().transpose(1, 2).flatten(2))


@pytest.mark.parametrize("read", ["torch.export", "torch.fx", "hooks"])
def test_one_model_read_in_three_ways(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "_METHODS", {read: find._METHODS[read]})
    found = find_patterns(Traceable(), {"x": X})
    assert found.method == read
    assert found.order == ("cut", "joined", "gate", "down", "out")
    assert [(each.layer, each.pattern, each.sizes) for each in found.findings] == [
        ("cut", SPLIT, (2, 4, 6)),
        ("joined", CONCAT, (2, 4, 6)),
        ("gate", CHUNK, (6, 6)),
        ("down", ACTIVATION, ()),
        ("out", RESHAPE, (6, 6)),
    ]
    assert found.activations() == {"down": "geglu"}


class Everything(nn.Module):
    """Both ends of a layer, repeated calls, keyword arguments, a branch, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.conv = nn.Conv1d(8, 8, 1)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor, scale: float = 1.0, *, mask: torch.Tensor | None = None) -> Any:
        x = self.embed(ids) * scale
        if mask is not None:
            x = x * mask
        for layer in (self.layers[1], self.layers[0], self.layers[1]):
            a, b = layer(x).split([3, 5], dim=-1)
            x = torch.cat([functional.silu(a), b], dim=-1)
        return {"logits": self.head(self.conv(x.mT).mT)}


@pytest.mark.parametrize("read", ["torch.export", "hooks"])
def test_order_names_and_merged_cuts(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "_METHODS", {read: find._METHODS[read]})
    ids, mask = torch.randint(9, (2, 4)), torch.ones(2, 4, 1)
    found = find_patterns(Everything(), ((ids,), {"mask": mask, "scale": 2.0}))
    assert found.order == ("layers.1", "layers.0", "conv", "head")
    assert found.output_segments() == {"layers.1": (3, 5), "layers.0": (3, 5)}
    assert found.input_segments() == {"layers.0": (3, 5), "layers.1": (3, 5)}
    assert found.activations() == {"layers.0": "silu (inputs 0 to 2)", "layers.1": "silu (inputs 0 to 2)"}
    assert find_patterns(Everything(), {"ids": ids}).order == found.order


class Branching(nn.Module):
    """Control flow that depends on values: only a run can read it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        if float(x.sum()) > 0:
            return y.chunk(2, -1)[0]
        return y


def test_a_model_that_branches_on_values_is_read_by_running_it() -> None:
    model = Branching().train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = find_patterns(model, torch.ones(2, 4))
    assert (found.method, found.output_segments()) == ("hooks", {"fc": (2, 2)})
    assert find_patterns(model, -torch.ones(2, 4)).output_segments() == {}
    assert model.training
    assert model.fc.training
    assert not model._forward_hooks
    assert not model.fc._forward_pre_hooks
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_an_example_that_does_not_run() -> None:
    with pytest.raises(
        ValidationError, match="Branching does not run on the example: .*mat1 and mat2"
    ) as caught:
        find_patterns(Branching(), torch.ones(2, 5))
    assert caught.value.hint


def test_segments_are_cut_wherever_any_finding_cuts() -> None:
    findings = (
        Finding("a", CHUNK, (6, 6), "chunk into 2"),
        Finding("a", SPLIT, (4, 4, 4), "split into 3"),
        Finding("a", ACTIVATION, (), "silu"),
        Finding("b", CONCAT, (3, 9), "cat of 2"),
    )
    patterns = Patterns(findings, "hooks", ("a", "b"))
    assert patterns.output_segments() == {"a": (4, 2, 2, 4)}
    assert patterns.input_segments() == {"b": (3, 9)}
    assert patterns.table().splitlines() == [
        "4 patterns in 2 layers, read by hooks",
        "layer  pattern            segments  seen",
        "a      linear2chunk       2×6       chunk into 2",
        "a      linear2split       3×4       split into 3",
        "a      activation2linear            silu",
        "b      concat2linear      3+9       cat of 2",
    ]


def test_pattern_lists() -> None:
    assert SegPattern.all() == list(SegPattern)
    assert set(SegPattern.all()) - set(SegPattern.seg()) == {SegPattern.ACTIVATION2LINEAR}
