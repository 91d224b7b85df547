"""QuIP: LDLQ rounding in a basis where neither weights nor inputs have outliers.

Chee et al., https://arxiv.org/abs/2307.13304. With random rotations P of the outputs and R of the
inputs, W' = P W Rᵀ is rounded against H' = R H Rᵀ. LDLQ is GPTQ's recursion under another name
(their Theorem 6), so :func:`~qwodel.algorithms.gptq.gptq` does it.

The codes belong to the rotated basis, and a reader must know the transform. For readers that know
none, rounding the restored weight a second time would undo the work: there the codes are solved
for in the original basis, which is plain LDLQ, and rotation has nothing to add.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from qwodel.algorithms.gptq import BlockSolver, GptqOptions, gptq
from qwodel.algorithms.hadamard import Rotation
from qwodel.algorithms.quant_types import ROW, QuantType
from qwodel.algorithms.scales import Quantized
from qwodel.algorithms.smoothing import smoothing_scales
from qwodel.algorithms.tiles import check_finite, check_matrix

__all__ = ["QuipOptions", "QuipTransform", "input_metric", "quip_transformed"]


@dataclass(frozen=True, slots=True)
class QuipOptions:
    """How QuIP works.

    Attributes:
        solver: the LDLQ recursion's settings.
        hadamard: rotate; without it QuIP is LDLQ alone.
        seed: of the rotations.
        smoothing_alpha: SmoothQuant's α, where activation maxima are given.
    """

    solver: GptqOptions = field(default_factory=GptqOptions)
    hadamard: bool = True
    seed: int = 0
    smoothing_alpha: float = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class QuipTransform:
    """The change of basis that stored codes belong to: W' = P · W · diag(s) · Rᵀ.

    Attributes:
        outputs: P, or ``None`` for the identity.
        inputs: R, or ``None``.
        smoothing: s, fp32 ``[N]``, or ``None`` for ones.
    """

    outputs: Rotation | None = None
    inputs: Rotation | None = None
    smoothing: torch.Tensor | None = None

    @classmethod
    def seeded(cls, shape: tuple[int, int], seed: int) -> QuipTransform:
        """The rotations of a weight ``[M, N]`` that ``seed`` stands for."""
        return cls(Rotation.random(shape[0], seed + 1), Rotation.random(shape[1], seed))

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """W', in the weight's dtype."""
        if self.smoothing is not None:
            weight = weight * self.smoothing.to(weight)
        if self.inputs is not None:
            weight = self.inputs.apply(weight)
        return weight if self.outputs is None else self.outputs.apply(weight.T).T

    def restore(self, weight: torch.Tensor) -> torch.Tensor:
        """W from W'."""
        if self.outputs is not None:
            weight = self.outputs.inverse(weight.T).T
        if self.inputs is not None:
            weight = self.inputs.inverse(weight)
        return weight if self.smoothing is None else weight / self.smoothing.to(weight)

    def gram(self, gram: torch.Tensor) -> torch.Tensor:
        """H' = R diag(1/s) H diag(1/s) Rᵀ, fp64 ``[N, N]``."""
        work = gram.double()
        if self.smoothing is not None:
            inverse = 1 / self.smoothing.double()
            work = work * inverse * inverse[:, None]
        if self.inputs is not None:
            work = self.inputs.apply(self.inputs.apply(work).T)
        return (work + work.T) / 2


def quip_transformed(
    weight: torch.Tensor,
    quant_type: QuantType,
    gram: torch.Tensor | None,
    options: QuipOptions,
    activation_max: torch.Tensor | None = None,
    *,
    inner: BlockSolver | None = None,
) -> tuple[Quantized, QuipTransform]:
    """Round in the rotated basis, one scale a row of W'.

    Args:
        weight: ``[M, N]``, bf16, fp16, fp32 or fp64.
        gram: ``[N, N]`` XᵀX of real inputs; ``None`` takes ``activation_max`` squared as its
            diagonal, or else the identity, for which LDLQ rounds to nearest.
        activation_max: ``[N]`` greatest absolute inputs; smooths before the rotation.
        inner: rounds one block of columns.

    Returns:
        codes and scales of W', and the transform that restores W.

    Raises:
        ValidationError: NaN or Inf in the weight, or statistics that do not fit.
    """
    check_matrix(weight)
    check_finite(weight)
    if weight.numel() == 0:
        return gptq(
            weight, quant_type, ROW, input_metric(weight, gram, activation_max)
        ).quantized, QuipTransform()
    smoothing = None
    if activation_max is not None:
        smoothing = smoothing_scales(activation_max, weight, options.smoothing_alpha)
    transform = QuipTransform(smoothing=smoothing)
    if options.hadamard:
        rows, columns = weight.shape
        transform = replace(QuipTransform.seeded((rows, columns), options.seed), smoothing=smoothing)
    metric = transform.gram(input_metric(weight, gram, activation_max))
    solved = gptq(transform.apply(weight.double()), quant_type, ROW, metric, options.solver, solver=inner)
    return solved.quantized, transform


def input_metric(
    weight: torch.Tensor, gram: torch.Tensor | None, activation_max: torch.Tensor | None
) -> torch.Tensor:
    """What is known of the inputs as a Gram matrix: ``gram``, else diag(maxima²), else the identity."""
    check_matrix(weight)
    if gram is not None:
        return gram
    if activation_max is not None:
        return torch.diag(activation_max.double().square())
    return torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
