"""QuIP to INT8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from qwodel.algorithms.gptq import GptqOptions, gptq
from qwodel.algorithms.quant_types import INT8
from qwodel.algorithms.quip import QuipOptions, QuipTransform, input_metric, quip_transformed
from qwodel.devices import StreamingOptions, device_memory
from qwodel.exceptions import ConfigurationError
from qwodel.int8.gptq import block_solver, device_or_cpu, scale_granularity

__all__ = ["QuIPInt8Converter"]

_SCHEMES = ("tensor", "block")


class QuIPInt8Converter:
    """Quantizes weight matrices to INT8 by LDLQ, in a rotated basis where codes may stay there.

    With ``store_transformed`` weights are rotated by seeded random Hadamard transforms, rounded there
    by LDLQ and kept so: the least error of all INT8 forms here, for readers that know the
    transform (:attr:`transform` holds it after each conversion). For all other readers the codes are
    solved for in the original basis, where LDLQ is GPTQ's recursion; rounding a restored weight a
    second time would lose what the rotation won.

    Args:
        block_size: columns between two updates of all later columns, and the side of scale blocks
            with ``requant_scheme="block"``.
        device: where to solve; the CPU, with a warning, where there is no CUDA.
        actorder: columns with the largest inputs first.
        use_hadamard: rotate, where codes stay in the rotated basis.
        seed: of the rotations; 0 if not given, so that runs repeat.
        use_triton: run the inner loop as one Triton kernel; same codes.
        lazy_updates: update later columns once a block; same codes.
        store_transformed: leave codes and row scales in the rotated basis.
        requant_scheme: scales in the original basis: ``"tensor"`` (see the next argument) or
            ``"block"``, one for each square of ``block_size`` weights.
        requant_tensor_use_per_row_scale: one scale a row instead of one for the tensor.
        streaming_mode, streaming_thresholds, no_memory_limits: which weights a device leaves to the CPU:
            those whose inputs, or elements to rotate, exceed the mode's thresholds.
        use_checkpointed_ldlq: make the inverse factor in parts for inputs of
            ``checkpointed_ldlq_threshold`` or more: less memory, same codes.
        checkpoint_segments: the number of parts.

    Raises:
        ConfigurationError: an argument has a bad value.
        DependencyError: ``use_triton`` without Triton.
    """

    def __init__(
        self,
        block_size: int = 128,
        device: str = "cuda",
        actorder: bool = True,
        use_hadamard: bool = True,
        seed: int | None = None,
        use_triton: bool = False,
        lazy_updates: bool = True,
        store_transformed: bool = False,
        requant_scheme: str = "tensor",
        requant_tensor_use_per_row_scale: bool = True,
        streaming_mode: str = "balanced",
        streaming_thresholds: Mapping[str, int | None] | None = None,
        no_memory_limits: bool = False,
        use_checkpointed_ldlq: bool = False,
        checkpointed_ldlq_threshold: int = 8192,
        checkpoint_segments: int = 4,
    ) -> None:
        if requant_scheme not in _SCHEMES:
            raise ConfigurationError(f"requant_scheme is 'tensor' or 'block', not {requant_scheme!r}")
        mode = "row" if requant_tensor_use_per_row_scale else "tensor"
        self.granularity = scale_granularity("block" if requant_scheme == "block" else mode, block_size)
        solver = GptqOptions(
            block_size,
            act_order=actorder,
            lazy=lazy_updates,
            segments=checkpoint_segments,
            segment_from=checkpointed_ldlq_threshold,
        )
        if not use_checkpointed_ldlq:
            solver = replace(solver, segments=1)
        self.options = QuipOptions(solver, use_hadamard, seed or 0)
        self.store_transformed = store_transformed
        self.device = device_or_cpu(device)
        self.solver = block_solver(use_triton)
        self.streaming = StreamingOptions(streaming_mode, dict(streaming_thresholds or {}), no_memory_limits)
        self.transform: QuipTransform | None = None

    def convert(
        self,
        weight: torch.Tensor,
        H: torch.Tensor | None = None,
        activation_scales: torch.Tensor | None = None,
        smoothquant_alpha: float = 0.5,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize one weight.

        Args:
            weight: ``[M, N]``, bf16, fp16, fp32 or fp64.
            H: ``[N, N]`` XᵀX of real inputs, up to a factor.
            activation_scales: ``[N]`` greatest absolute inputs. They stand in for ``H`` where it is not
                given; with ``store_transformed`` weights are smoothed by them before they are rotated.
            smoothquant_alpha: share of the inputs' difficulty that smoothing moves into the weights.

        Returns:
            int8 codes ``[M, N]`` and their fp32 dequant scale, of the rotated weight with
            ``store_transformed``; and the fp32 weights, in the original basis, that they stand for.

        Raises:
            ValidationError: not a floating-point matrix, NaN or Inf in it, or statistics that do not fit.
        """
        home, place = weight.device, self._place(weight)
        there = weight.to(place)
        gram = None if H is None else H.to(place)
        peaks = None if activation_scales is None else activation_scales.to(place)
        solver = self.options.solver
        if self.store_transformed:
            options = replace(self.options, smoothing_alpha=smoothquant_alpha)
            codes, transform = quip_transformed(there, INT8, gram, options, peaks, inner=self.solver)
            self.transform, done = transform, transform.restore(codes.dequantize())
        else:
            metric = input_metric(there, gram, peaks)
            codes = gptq(there, INT8, self.granularity, metric, solver, solver=self.solver).quantized
            self.transform, done = None, codes.dequantize()
        return codes.codes.to(home), codes.scale.to(home), done.to(home)

    def _place(self, weight: torch.Tensor) -> torch.device:
        """The device, or the CPU for a weight beyond the thresholds of the streaming mode."""
        if self.device.type == "cpu" or weight.ndim != 2:
            return self.device
        limits = self.streaming.thresholds_for(device_memory(self.device))
        columns = weight.shape[1]
        needs = {"hessian": columns, "ldlq": columns}
        if self.store_transformed and self.options.hadamard:
            odd = max(size // (size & -size) for size in weight.shape if size)
            needs |= {"hadamard": weight.numel(), "ortho": odd}
        return torch.device("cpu") if limits.exceeded(needs) else self.device
