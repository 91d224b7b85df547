"""Signal-to-quantization-noise ratios of weights and outputs, layer by layer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from qwodel.exceptions import ValidationError
from qwodel.report import TensorQuality, decibels

__all__ = ["QualityReporter", "sqnr", "tensor_quality"]

_PIECE = 1 << 20  # elements converted to fp64 at a time


def sqnr(reference: torch.Tensor, estimate: torch.Tensor) -> float:
    """10 log₁₀(‖reference‖² / ‖reference − estimate‖²) in dB, summed in fp64.

    Equal tensors give ``inf`` (two zero tensors too); a zero reference with an error, or an
    estimate that is not finite, gives ``-inf``.

    Raises:
        ValidationError: the shapes differ.
    """
    signal, noise = _powers(reference, estimate)
    return decibels(signal, noise)


def _powers(reference: torch.Tensor, estimate: torch.Tensor) -> tuple[float, float]:
    """Sums of squares of the reference and of the error."""
    if reference.shape != estimate.shape:
        raise ValidationError(f"cannot compare shapes {list(reference.shape)} and {list(estimate.shape)}")
    signal = noise = 0.0
    pairs = zip(
        torch.split(reference.detach().reshape(-1), _PIECE),
        torch.split(estimate.detach().reshape(-1), _PIECE),
        strict=True,
    )
    for piece, other in pairs:
        exact = piece.double()
        signal += float(exact.square().sum())
        noise += float((other.to(exact) - exact).square().sum())
    return signal, noise


def tensor_quality(name: str, reference: torch.Tensor, estimate: torch.Tensor) -> TensorQuality:
    """Measure a tensor against its source, of the same shape; sums are formed in fp64.

    Raises:
        ValidationError: the shapes differ.
    """
    signal, noise = _powers(reference, estimate)
    return TensorQuality(name, decibels(signal, noise), noise / max(reference.numel(), 1))


class QualityReporter:
    """Collects the quality of layers and reports them, worst first.

    Only numbers are kept, never tensors.

    Args:
        threshold: layers below this SQNR (dB; of the output where known) are warned about.
    """

    def __init__(self, threshold: float = 30.0) -> None:
        self.threshold = threshold
        self._layers: dict[str, TensorQuality] = {}

    def add_layer(
        self,
        name: str,
        original: torch.Tensor,
        dequantized: torch.Tensor,
        activations: torch.Tensor | None = None,
        gram: torch.Tensor | None = None,
    ) -> TensorQuality:
        """Measure a layer. A name given again replaces the earlier measurement.

        Args:
            original, dequantized: the weight before and as decoded from what was saved.
            activations: ``[..., N]`` inputs of the layer, for a weight ``[M, N]``.
            gram: ``[N, N]`` XᵀX of inputs, instead of ``activations``.

        Raises:
            ValidationError: shapes that do not fit, or both kinds of statistics.
        """
        layer = tensor_quality(name, original, dequantized)
        if activations is not None and gram is not None:
            raise ValidationError("give either activations or gram, not both")
        if activations is not None or gram is not None:
            layer = replace(layer, output_sqnr_db=_output_sqnr(original, dequantized, activations, gram))
        self._layers[name] = layer
        return layer

    @property
    def layers(self) -> list[TensorQuality]:
        """All layers, worst first; equals by name."""
        return sorted(self._layers.values(), key=lambda layer: (layer.judged_by, layer.name))

    @property
    def below_threshold(self) -> list[TensorQuality]:
        """The layers to be warned about, worst first."""
        return [layer for layer in self.layers if layer.judged_by < self.threshold]

    def to_dict(self) -> dict[str, Any]:
        """The report for a manifest; JSON-safe."""
        return {
            "threshold_db": self.threshold,
            "below_threshold": [layer.name for layer in self.below_threshold],
            "layers": [_described(layer) for layer in self.layers],
        }

    def get_report_string(self) -> str:
        """A table of all layers, worst first, with those below the threshold marked."""
        layers = self.layers
        if not layers:
            return "No layers were measured."
        width = max(len("layer"), *(len(layer.name) for layer in layers))
        lines = [f"{'layer':<{width}}  weight SQNR  output SQNR  {'MSE':>9}"]
        for layer in layers:
            output = "–" if layer.output_sqnr_db is None else f"{layer.output_sqnr_db:.2f}"
            mark = f"  below {self.threshold:g} dB" if layer.judged_by < self.threshold else ""
            lines.append(
                f"{layer.name:<{width}}  {layer.sqnr_db:>11.2f}  {output:>11}  {layer.mse:>9.2e}{mark}"
            )
        low = len(self.below_threshold)
        lines.append(f"{len(layers)} layers, {low} below {self.threshold:g} dB; SQNR in dB")
        return "\n".join(lines)


def _described(layer: TensorQuality) -> dict[str, str | float | None]:
    """Infinities become the strings ``"inf"`` and ``"-inf"``, which ``float()`` reads."""
    numbers = {"weight_sqnr_db": layer.sqnr_db, "mse": layer.mse, "output_sqnr_db": layer.output_sqnr_db}
    return {"name": layer.name} | {
        key: value if value is None or math.isfinite(value) else str(value) for key, value in numbers.items()
    }


def _output_sqnr(
    original: torch.Tensor,
    dequantized: torch.Tensor,
    activations: torch.Tensor | None,
    gram: torch.Tensor | None,
) -> float:
    columns = original.shape[-1]
    fits = (gram is not None and gram.shape == (columns, columns)) or (
        activations is not None and activations.ndim and activations.shape[-1] == columns
    )
    if original.ndim != 2 or not fits:
        raise ValidationError(f"these statistics do not fit a weight of shape {list(original.shape)}")
    # The error is formed in fp64; the products need no more than fp32.
    error = (dequantized.double() - original.double()).float()
    weight = original.float()
    if gram is not None:
        return decibels(_quadratic(weight, gram.float()), _quadratic(error, gram.float()))
    inputs = activations.reshape(-1, columns).float()  # type: ignore[union-attr]
    return decibels(_energy(inputs @ weight.T), _energy(inputs @ error.T))


def _quadratic(rows: torch.Tensor, form: torch.Tensor) -> float:
    return max(0.0, float(((rows @ form).double() * rows).sum()))


def _energy(outputs: torch.Tensor) -> float:
    return float(outputs.double().square().sum())
