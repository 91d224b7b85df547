"""MIL operations that move elements about."""

from __future__ import annotations

import torch
from torch.nn import functional

from qwodel.backends.coreml.mil.registry import flag, integers, operation

__all__: list[str] = []

Tensor = torch.Tensor


@operation("shape")
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@operation("reshape")
def reshape(x: Tensor, shape: Tensor) -> Tensor:
    # 0 copies a dimension of the input.
    sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(integers(shape))]
    return x.reshape(sizes)


@operation("transpose")
def transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(integers(perm))


@operation("expand_dims")
def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    given = integers(axes)
    rank = x.ndim + len(given)
    for axis in sorted(axis % rank for axis in given):
        x = x.unsqueeze(axis)
    return x


@operation("squeeze")
def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    if axes is None:
        return x.squeeze()
    return x.squeeze(tuple(integers(axes)))


@operation("concat")
def concat(values: list[Tensor], axis: Tensor, interleave: Tensor | None = None) -> Tensor:
    if flag(interleave):
        return torch.stack(values, int(axis) + 1).flatten(int(axis), int(axis) + 1)
    return torch.cat([each.reshape(1) if each.ndim == 0 else each for each in values], int(axis))


@operation("stack")
def stack(values: list[Tensor], axis: Tensor) -> Tensor:
    return torch.stack(values, int(axis))


@operation("split")
def split(
    x: Tensor, axis: Tensor, num_splits: Tensor | None = None, split_sizes: Tensor | None = None
) -> list[Tensor]:
    if split_sizes is not None:
        return list(torch.split(x, integers(split_sizes), int(axis)))
    return list(torch.tensor_split(x, int(num_splits if num_splits is not None else 1), int(axis)))


def _slices(
    rank: int,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None,
    begin_mask: Tensor | None,
    end_mask: Tensor | None,
    squeeze_mask: Tensor | None,
) -> tuple[slice | int, ...]:
    starts, ends = integers(begin), integers(end)
    strides = integers(stride, [1] * rank)
    open_start, open_end = integers(begin_mask, [0] * rank), integers(end_mask, [0] * rank)
    squeezed = integers(squeeze_mask, [0] * rank)
    found: list[slice | int] = []
    for axis in range(rank):
        if squeezed[axis]:
            found.append(starts[axis])
            continue
        if strides[axis] <= 0:
            raise ValueError("slices with negative strides")
        found.append(
            slice(
                None if open_start[axis] else starts[axis],
                None if open_end[axis] else ends[axis],
                strides[axis],
            )
        )
    return tuple(found)


@operation("slice_by_index")
def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    return x[_slices(x.ndim, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


@operation("slice_update")
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    changed = x.clone()
    changed[_slices(x.ndim, begin, end, stride, begin_mask, end_mask, squeeze_mask)] = update
    return changed


@operation("slice_by_size")
def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    for axis, (start, length) in enumerate(zip(integers(begin), integers(size), strict=True)):
        x = x.narrow(axis, start, x.shape[axis] - start if length == -1 else length)
    return x


@operation("gather")
def gather(
    x: Tensor,
    indices: Tensor,
    axis: Tensor | int = 0,
    batch_dims: Tensor | int = 0,
) -> Tensor:
    if int(batch_dims):
        raise ValueError("gather with batch_dims")
    axis = int(axis) % x.ndim
    # An index out of range raises here: on a device it would read elsewhere.
    wrapped = torch.where(indices < 0, indices + x.shape[axis], indices).long()
    found = x.index_select(axis, wrapped.reshape(-1))
    return found.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@operation("gather_along_axis")
def gather_along_axis(x: Tensor, indices: Tensor, axis: Tensor | int = 0) -> Tensor:
    return torch.gather(x, int(axis), indices.long())


@operation("tile")
def tile(x: Tensor, reps: Tensor) -> Tensor:
    return x.repeat(integers(reps))


@operation("fill")
def fill(shape: Tensor, value: Tensor | float = 0.0) -> Tensor:
    value = torch.as_tensor(value)
    return value.reshape(()).expand(integers(shape)).clone()


@operation("fill_like")
def fill_like(ref_tensor: Tensor, value: Tensor | float = 0.0) -> Tensor:
    return torch.as_tensor(value).reshape(()).expand(ref_tensor.shape).clone()


@operation("range_1d")
def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


@operation("pad")
def pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Tensor | float = 0.0) -> Tensor:
    amounts = integers(pad)
    pairs = [amounts[at : at + 2] for at in range(0, len(amounts), 2)]
    flat = [amount for pair in reversed(pairs) for amount in pair]
    if mode == "constant":
        return functional.pad(x, flat, value=float(constant_val))
    return functional.pad(x, flat, mode="replicate" if mode == "replicate" else mode)


@operation("reverse")
def reverse(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.flip(integers(axes, list(range(x.ndim))))


@operation("band_part")
def band_part(x: Tensor, lower: Tensor | int = -1, upper: Tensor | int = -1) -> Tensor:
    rows = torch.arange(x.shape[-2])[:, None]
    columns = torch.arange(x.shape[-1])[None, :]
    kept = torch.ones(x.shape[-2:], dtype=torch.bool)
    if int(lower) >= 0:
        kept &= rows - columns <= int(lower)
    if int(upper) >= 0:
        kept &= columns - rows <= int(upper)
    return torch.where(kept, x, torch.zeros_like(x))
