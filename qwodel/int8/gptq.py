"""GPTQ to INT8."""

from __future__ import annotations

import logging

import torch

from qwodel.algorithms.gptq import DEFAULT_DAMPING, BlockSolver, GptqOptions, gptq
from qwodel.algorithms.quant_types import INT8, ROW, TENSOR, Granularity
from qwodel.algorithms.quip import input_metric
from qwodel.devices import resolve_device
from qwodel.exceptions import ConfigurationError, DependencyError, did_you_mean

__all__ = ["GPTQInt8Converter"]

log = logging.getLogger(__name__)

_MODES = ("tensor", "row", "block", "group")


def scale_granularity(scaling_mode: str, scale_block: int) -> Granularity:
    """The granularity of a scaling mode.

    Raises:
        ConfigurationError: there is no such mode.
    """
    if scaling_mode not in _MODES:
        raise ConfigurationError(
            f"INT8 has no scaling mode {scaling_mode!r}; there are {', '.join(_MODES)}",
            hint=did_you_mean(str(scaling_mode), _MODES),
        )
    return {
        "tensor": TENSOR,
        "row": ROW,
        "block": Granularity.block(scale_block),
        "group": Granularity.group(scale_block),
    }[scaling_mode]


def device_or_cpu(device: str) -> torch.device:
    """The device, or the CPU (said in the log) where a machine has no CUDA."""
    if device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        log.warning("no CUDA device is available; computing on the CPU")
        return torch.device("cpu")
    return resolve_device(device)


def block_solver(use_triton: bool) -> BlockSolver | None:
    """The Triton kernel for GPTQ's inner loop where it is asked for.

    Raises:
        DependencyError: Triton is not installed.
    """
    if not use_triton:
        return None
    try:
        from qwodel.algorithms.gptq_triton import solve_block_triton
    except ImportError as error:
        raise DependencyError(
            "the Triton kernel needs triton", hint="pip install triton, or use_triton=False"
        ) from error
    return solve_block_triton


class GPTQInt8Converter:
    """Quantizes weight matrices to symmetric INT8 for the least error of the layer's output.

    Args:
        block_size: columns between two updates of all later columns; the codes do not depend on it.
        device: where to solve; the CPU, with a warning, where there is no CUDA.
        actorder: columns with the largest inputs first.
        lazy_updates: update later columns once a block instead of after every column; same codes.
        use_triton: run the inner loop as one Triton kernel; same codes.
        scaling_mode: ``"row"`` one scale a row, ``"tensor"`` one in all, ``"block"`` and ``"group"`` one for
            each square, or run in a row, of ``scale_block`` weights.
        scale_block: side of those.
        damping: share of the mean diagonal that is added to the Gram matrix.

    Raises:
        ConfigurationError: an argument has a bad value.
        DependencyError: ``use_triton`` without Triton.
    """

    def __init__(
        self,
        block_size: int = 128,
        device: str = "cuda",
        actorder: bool = True,
        lazy_updates: bool = True,
        use_triton: bool = False,
        scaling_mode: str = "row",
        scale_block: int = 128,
        damping: float = DEFAULT_DAMPING,
    ) -> None:
        self.options = GptqOptions(block_size, damping, actorder, lazy_updates)
        self.granularity = scale_granularity(scaling_mode, scale_block)
        self.device = device_or_cpu(device)
        self.solver = block_solver(use_triton)

    def convert(
        self,
        weight: torch.Tensor,
        H: torch.Tensor | None = None,
        activation_scales: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize one weight.

        Args:
            weight: ``[M, N]``, bf16, fp16, fp32 or fp64.
            H: ``[N, N]`` XᵀX of real inputs, up to a factor. Without it nothing is known of how
                columns go together, and the codes are the nearest.
            activation_scales: ``[N]`` magnitudes of the inputs, which then choose the scale.

        Returns:
            int8 codes ``[M, N]``; fp32 dequant scale, ``(M, 1)`` for rows, ``()`` for a tensor,
            ``(⌈M/b⌉, ⌈N/b⌉)`` for blocks, ``(M, ⌈N/b⌉)`` for groups; the fp32 weights they stand for.

        Raises:
            ValidationError: not a floating-point matrix, NaN or Inf in it, or statistics that do not fit.
        """
        home = weight.device
        there = weight.to(self.device)
        metric = input_metric(there, _to(H, self.device), _to(activation_scales, self.device))
        codes = gptq(there, INT8, self.granularity, metric, self.options, solver=self.solver).quantized
        return codes.codes.to(home), codes.scale.to(home), codes.dequantize().to(home)


def _to(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)
