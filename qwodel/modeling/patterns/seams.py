"""Seams by moving channel numbers through the graph.

Every move of data between a layer and where it is cut or joined is carried out on a tensor that
holds channel numbers instead of activations: which channels a piece has is then read off, whatever
dimensions, views and permutations lie between. The tensors are expanded views, so they take no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from qwodel.modeling.patterns.findings import Finding, SegPattern
from qwodel.modeling.patterns.operation_kinds import (
    activation_name,
    carried,
    gated_name,
    is_identity,
    is_move,
    is_split,
)
from qwodel.modeling.patterns.operations import GraphOperation, Value

__all__ = ["input_findings", "output_findings"]

_SLICES = ("slice", "getitem", "narrow", "split", "split_with_sizes", "unsafe_split", "tensor_split")
_RESHAPES = ("reshape", "view", "unsafe_view", "flatten")


def output_findings(linear: GraphOperation) -> Iterator[Finding]:
    """Yield how the outputs of a linear layer are cut: a seam is where no reader reads across."""
    output = linear.outputs[0]
    channels = torch.arange(output.shape[-1])
    pieces = _pieces(output, channels.expand(output.shape))
    for pattern in (SegPattern.LINEAR2CHUNK, SegPattern.LINEAR2SPLIT):
        chosen = [piece for piece in pieces or () if piece.pattern is pattern]
        labels = torch.zeros_like(channels)
        for piece in chosen:
            inside = torch.isin(channels, piece.channels)
            labels = 2 * labels + inside
            labels = torch.unique(labels, return_inverse=True)[1]
        if sizes := _sizes(labels, interleaved=True):
            yield Finding(str(linear.layer), pattern, sizes, chosen[0].source)


def input_findings(linear: GraphOperation) -> Iterator[Finding]:
    """Yield what the inputs of a linear layer are joined from, and the activation that gives them."""
    value = linear.inputs()[0]
    joined: set[tuple[int, ...]] = set()
    activated = False
    for join in _joins(value):
        labels = _along(join.labels, len(value.shape) - 1)
        if labels is None:
            continue
        if join.pattern is SegPattern.ACTIVATION2LINEAR:
            if not activated:
                activated = True
                yield Finding(str(linear.layer), join.pattern, (), join.source + _range(labels))
        elif (sizes := _sizes(labels)) and sizes not in joined:
            joined.add(sizes)
            yield Finding(str(linear.layer), join.pattern, sizes, join.source)


@dataclass(frozen=True, slots=True)
class _Piece:
    channels: torch.Tensor
    pattern: SegPattern
    source: str


@dataclass(frozen=True, slots=True)
class _Join:
    """``labels`` has a value's shape: one number a segment, or 1 and 0 for in and out of an activation."""

    pattern: SegPattern
    source: str
    labels: torch.Tensor


def _pieces(value: Value, channels: torch.Tensor) -> list[_Piece] | None:
    """Return the pieces that the value's readers take, ``None`` where one of them takes it whole."""
    found: list[_Piece] = []
    for reader in dict.fromkeys(value.readers):
        taken = _pieces_of(reader, value, channels)
        if taken is None:
            return None
        found += taken
    return found or None


def _pieces_of(reader: GraphOperation, value: Value, channels: torch.Tensor) -> list[_Piece] | None:
    if reader.name == "glu":
        halves = channels.chunk(2, _dim_of_glu(reader))
        return [_Piece(_unique(half), SegPattern.LINEAR2CHUNK, "glu") for half in halves]
    if is_move(reader):
        moved = reader.replay(value, channels)
    elif is_identity(reader) or carried(reader) is value:
        moved = [channels.expand(reader.outputs[0].shape)]
    else:
        return None
    found: list[_Piece] = []
    whole = _unique(channels)
    for output, tensor in zip(reader.outputs, moved, strict=True):
        inside = _unique(tensor)
        deeper = _pieces(output, tensor)
        if len(inside) < len(whole):
            found += [_Piece(inside, _cut(reader), _describe(reader)), *(deeper or ())]
        elif deeper is None and output.readers:
            return None
        else:
            found += deeper or ()
    return found


def _cut(operation: GraphOperation) -> SegPattern:
    return SegPattern.LINEAR2SPLIT if operation.name in _SLICES else SegPattern.LINEAR2CHUNK


def _dim_of_glu(operation: GraphOperation) -> int:
    dim = operation.args[1] if len(operation.args) > 1 else operation.kwargs.get("dim", -1)
    return int(getattr(operation.call, "dim", dim))


def _joins(value: Value) -> Iterator[_Join]:
    """Yield every join on the way back from ``value``, with labels in its shape."""
    operation = value.producer
    if operation is None or value.constant:
        return
    if operation.name in ("cat", "concat", "concatenate"):
        yield from _joins_of_cat(operation, value)
    elif operation.name == "stack":
        dim, count = _dim(operation, value), len(operation.inputs())
        yield _Join(
            SegPattern.STACK2LINEAR, _describe(operation), _spread(torch.arange(count), value.shape, dim)
        )
    elif operation.name == "glu":
        yield _activation("glu", value)
    elif name := activation_name(operation):
        yield _activation(name, value)
        for join in _joins(operation.inputs()[0]):
            if join.pattern is not SegPattern.ACTIVATION2LINEAR:
                yield join
    elif is_move(operation):
        yield from _joins_of_move(operation, value)
    elif is_identity(operation):
        yield from _joins(operation.inputs()[0])
    elif (source := carried(operation)) is not None:
        yield from _joins(source)
    elif operation.name == "mul":
        yield from _joins_of_product(operation, value)


def _joins_of_cat(operation: GraphOperation, value: Value) -> Iterator[_Join]:
    dim = _dim(operation, value)
    parts = operation.inputs()
    sizes = torch.tensor([part.shape[dim] for part in parts])
    own = torch.arange(len(parts)).repeat_interleave(sizes)
    yield _Join(SegPattern.CONCAT2LINEAR, _describe(operation), _spread(own, value.shape, dim))
    for place, part in enumerate(parts):
        for join in _joins(part):
            labels = _along(join.labels, dim)
            if labels is None:
                continue
            # Parts beside this one keep labels of their own, or lie outside its activation.
            inside = own == place
            spread = torch.zeros_like(own) if join.pattern is SegPattern.ACTIVATION2LINEAR else -1 - own
            spread[inside] = labels
            yield _Join(join.pattern, join.source, _spread(spread, value.shape, dim))


def _joins_of_move(operation: GraphOperation, value: Value) -> Iterator[_Join]:
    source = operation.inputs()[0]
    place = operation.output_of(value)
    stacked = False
    for join in _joins(source):
        stacked |= join.pattern is SegPattern.STACK2LINEAR
        yield _Join(join.pattern, join.source, operation.replay(source, join.labels)[place])
    rows = _merged_rows(source.shape, value.shape) if operation.name in _RESHAPES else 0
    if rows and not stacked:  # the rows of a stack are its parts
        labels = torch.arange(rows).repeat_interleave(value.shape[-1] // rows)
        what = f"{operation.name} of {rows}×{value.shape[-1] // rows}"
        yield _Join(SegPattern.RESHAPE2LINEAR, what, _spread(labels, value.shape, len(value.shape) - 1))


def _joins_of_product(operation: GraphOperation, value: Value) -> Iterator[_Join]:
    for factor in operation.inputs():
        if factor.shape != value.shape:
            continue
        for join in _joins(factor):
            gate = join.pattern is SegPattern.ACTIVATION2LINEAR
            yield _Join(join.pattern, gated_name(join.source) if gate else join.source, join.labels)


def _merged_rows(before: Sequence[int], after: Sequence[int]) -> int:
    """Return how many rows of ``before`` a row of ``after`` is made of; 0 where it is not made of rows.

    Of several merged dimensions the outermost counts: a ``C×H×W`` map is C rows.
    """
    if len(after) < 1 or len(before) < 2 or after[-1] == before[-1]:
        return 0
    width = before[-1]
    for size in before[-2::-1]:
        width *= size
        if width == after[-1]:
            return size
    return after[-1] // before[-1] if after[-1] % before[-1] == 0 and after[-1] > before[-1] else 0


def _activation(name: str, value: Value) -> _Join:
    return _Join(SegPattern.ACTIVATION2LINEAR, name, torch.ones(()).long().expand(value.shape))


def _dim(operation: GraphOperation, value: Value) -> int:
    named = operation.kwargs.get("dim", operation.kwargs.get("axis"))
    dim = named if named is not None else (operation.args[1] if len(operation.args) > 1 else 0)
    return int(dim) % len(value.shape)


def _describe(operation: GraphOperation) -> str:
    if operation.name in ("cat", "concat", "concatenate", "stack"):
        return f"{operation.name} of {len(operation.inputs())}"
    count = len(operation.outputs)
    return f"{operation.name} into {count}" if is_split(operation) else operation.name


def _spread(labels: torch.Tensor, shape: Sequence[int], dim: int) -> torch.Tensor:
    """Return ``labels`` along ``dim``, the same everywhere else, as a view of ``shape``."""
    return labels.reshape([-1 if place == dim else 1 for place in range(len(shape))]).expand(tuple(shape))


def _squeezed(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with its expanded dimensions narrowed to one."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _unique(tensor: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.unique(_squeezed(tensor))
    return found


def _along(labels: torch.Tensor, dim: int) -> torch.Tensor | None:
    """Return the labels along ``dim`` where they depend on it alone."""
    narrow = _squeezed(labels).movedim(dim, 0)
    rows = narrow.reshape(narrow.shape[0], -1)
    if not bool((rows == rows[:, :1]).all()):
        return None
    return rows[:, 0].expand(labels.shape[dim])


def _sizes(labels: torch.Tensor, *, interleaved: bool = False) -> tuple[int, ...]:
    """Return the lengths of the runs of equal labels; none for a single run.

    Where segments take turns, none too, unless ``interleaved`` allows it for runs of more than one.
    """
    runs = [(label, len(list(group))) for label, group in groupby(labels.tolist())]
    if len(runs) < 2:
        return ()
    if len(runs) > len({label for label, _ in runs}) and not (
        interleaved and min(size for _, size in runs) > 1
    ):
        return ()
    return tuple(size for _, size in runs)


def _range(inside: torch.Tensor) -> str:
    if bool(inside.all()):
        return ""
    places = inside.nonzero().flatten()
    return f" (inputs {int(places[0])} to {int(places[-1])})"
