"""Orthogonal transforms that spread outliers: ConvRot's grouped one, and a Hadamard of any size.

Two of them:

* :func:`convrot_matrix` is the rotation that ComfyUI's INT8 reader applies to activations, in
  groups of ``size`` neighbouring inputs, ``size`` a power of 4: H = ⊗ H₄ / √size.
* :class:`Rotation` is a randomized Hadamard transform of all inputs (or outputs) at once, for
  QuIP: signs, then a Kronecker product of a Walsh–Hadamard matrix of the largest power of two
  in the size with a dense orthogonal factor for the rest (Chee et al.,
  https://arxiv.org/abs/2307.13304; Tseng et al., https://arxiv.org/abs/2402.04396).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from qwodel.exceptions import ConfigurationError, ValidationError

__all__ = [
    "MAX_CONVROT_GROUP",
    "Basis",
    "ConvRot",
    "Rotation",
    "convrot_gram",
    "convrot_group_size",
    "convrot_matrix",
    "convrot_weight",
    "walsh_hadamard",
]

MAX_CONVROT_GROUP = 256
"""Groups no larger than this are the custom of published files, and cheap to apply."""

_H4 = ((1.0, 1.0, 1.0, -1.0), (1.0, 1.0, -1.0, 1.0), (1.0, -1.0, 1.0, 1.0), (-1.0, 1.0, 1.0, 1.0))


def convrot_group_size(columns: int, largest: int = MAX_CONVROT_GROUP) -> int | None:
    """The largest power of 4 up to ``largest`` that divides ``columns``; ``None`` where not even 4 does."""
    size = None
    power = 4
    while power <= largest:
        if columns and columns % power == 0:
            size = power
        power *= 4
    return size


def convrot_matrix(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """ConvRot's rotation, ``[size, size]``, symmetric and orthogonal, so its own inverse.

    Raises:
        ConfigurationError: ``size`` is no power of 4.
    """
    power = round(math.log(size, 4)) if size > 0 else 0
    if size < 4 or 4**power != size:
        raise ConfigurationError(f"a ConvRot group is a power of 4, not {size}")
    base = torch.tensor(_H4, dtype=torch.float64)
    matrix = base
    for _ in range(power - 1):
        matrix = torch.kron(matrix, base)
    return (matrix / math.sqrt(size)).to(dtype)


def convrot_weight(weight: torch.Tensor, size: int) -> torch.Tensor:
    """W · Hᵀ in each group of ``size`` columns, in fp32 (fp64 for fp64). Applying it twice gives W back.

    Args:
        weight: ``[M, N]``, N a multiple of ``size``.

    Raises:
        ValidationError: the columns are no multiple of ``size``.
        ConfigurationError: ``size`` is no power of 4.
    """
    rows, columns = weight.shape
    if columns % size:
        raise ValidationError(f"{columns} columns do not fall into ConvRot groups of {size}")
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    matrix = convrot_matrix(size, work).to(weight.device)
    groups = weight.to(work).reshape(rows, columns // size, size)
    return (groups @ matrix).reshape(rows, columns)


def convrot_gram(gram: torch.Tensor, size: int) -> torch.Tensor:
    """The Gram matrix of rotated inputs: R H Rᵀ for R = blockdiag(H, …), ``[N, N]``."""
    return convrot_weight(convrot_weight(gram, size).T, size).T


class Basis(Protocol):
    """A change of basis that codes belong to; it keeps the lengths of errors."""

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight ``[M, N]`` in the basis."""

    def restore(self, weight: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`apply`."""

    def gram(self, gram: torch.Tensor) -> torch.Tensor:
        """The Gram matrix ``[N, N]`` of inputs in the basis."""


@dataclass(frozen=True, slots=True)
class ConvRot:
    """ConvRot's basis: columns rotated in groups of ``size``."""

    size: int

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight ``[M, N]``, N a multiple of the group, with its columns rotated; fp32 (fp64 for fp64)."""
        return convrot_weight(weight, self.size)

    def restore(self, weight: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`apply`: the rotation is its own inverse."""
        return convrot_weight(weight, self.size)

    def gram(self, gram: torch.Tensor) -> torch.Tensor:
        """The Gram matrix ``[N, N]`` of inputs rotated as the columns are: R H Rᵀ."""
        return convrot_gram(gram, self.size)


def walsh_hadamard(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal Walsh–Hadamard transform (Sylvester's order) of the last axis, a power of two long.

    Raises:
        ValidationError: the length is no power of two.
    """
    length = x.shape[-1]
    if length < 1 or length & (length - 1):
        raise ValidationError(f"a Walsh–Hadamard transform needs a power of two, not {length}")
    shape = x.shape
    step = 1
    while step < length:
        pairs = x.reshape(*shape[:-1], length // (2 * step), 2, step)
        even, odd = pairs.unbind(dim=-2)
        x = torch.stack((even + odd, even - odd), dim=-2).reshape(shape)
        step *= 2
    return x / math.sqrt(length)


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """A randomized Hadamard transform of ``size`` coordinates: y = K · diag(signs) · x.

    K = W ⊗ O, with W the Walsh–Hadamard matrix of the largest power of two in ``size`` and O
    orthogonal of the odd rest; nothing is padded.

    Attributes:
        signs: ``[size]`` of ±1, fp32.
        factor: O, ``[odd, odd]``, fp64.
    """

    signs: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def random(cls, size: int, seed: int) -> Rotation:
        """The rotation of ``size`` coordinates that ``seed`` stands for.

        Raises:
            ValidationError: no coordinates.
        """
        if size < 1:
            raise ValidationError(f"a rotation needs coordinates, not {size}")
        generator = torch.Generator().manual_seed(seed)
        return cls.from_signs(torch.randint(0, 2, (size,), generator=generator) * 2 - 1)

    @classmethod
    def from_signs(cls, signs: torch.Tensor) -> Rotation:
        """The rotation with these signs, ±1 of any dtype."""
        size = len(signs)
        return cls(signs.float(), orthogonal_factor(size // (size & -size)))

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return self.signs.shape[0]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate the last axis of ``x``, in its dtype."""
        return self._kronecker(x * self.signs.to(x), self.factor.to(x))

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`apply`."""
        return self._kronecker(x, self.factor.to(x).T) * self.signs.to(x)

    def _kronecker(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        odd = factor.shape[0]
        grid = x.reshape(*x.shape[:-1], self.size // odd, odd)
        if odd > 1:
            grid = grid @ factor.T
        return walsh_hadamard(grid.transpose(-1, -2)).transpose(-1, -2).reshape(x.shape)


def orthogonal_factor(size: int) -> torch.Tensor:
    """An orthogonal matrix of any size that mixes all coordinates about evenly, fp64 ``[size, size]``.

    The real discrete Hartley transform, cas(2πjk/n)/√n: symmetric, its own inverse, and no entry
    above √(2/n).
    """
    index = torch.arange(size, dtype=torch.float64)
    # The product is reduced first: cosines of large arguments lose digits.
    angle = 2 * math.pi / size * torch.remainder(index[:, None] * index, size)
    return (angle.cos() + angle.sin()) / math.sqrt(size)
