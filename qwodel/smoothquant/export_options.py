"""What an export to W8A8 can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwodel.algorithms.hadamard import MAX_CONVROT_GROUP
from qwodel.checkpoint.plan.recipe import DEFAULT_SHARD_SIZE
from qwodel.exceptions import CalibrationError, ConfigurationError
from qwodel.modeling.calibration_batches import CalibrationOptions
from qwodel.smoothquant.scheme import Scheme
from qwodel.smoothquant.smooth import Alpha

__all__ = ["ExportOptions", "Rotations"]

Rotations = Literal["none", "folded", "all"]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How a model becomes W8A8.

    Attributes:
        activations: a scale a token (``dynamic``), or one a layer from calibration (``static``).
        alpha, inner_alpha: see :func:`~qwodel.smoothquant.smooth.smooth_model`.
        rotations: ``folded`` may rotate value heads, which is exact and changes no reader; ``all``
            rotates the inputs of all layers, which only :class:`Int8ForCausalLM` computes.
        gptq: round weights by GPTQ.
        calibration: text to run the model on.
        act_scales: a file of activation scales, instead of text where α is a number.
        max_shard_size: bytes a shard.
    """

    activations: Literal["dynamic", "static"] = "dynamic"
    alpha: Alpha = "search"
    inner_alpha: Alpha | None = None
    rotations: Rotations = "folded"
    gptq: bool = False
    calibration: CalibrationOptions | None = None
    act_scales: Path | None = None
    max_shard_size: int = DEFAULT_SHARD_SIZE

    def __post_init__(self) -> None:
        if self.rotations not in ("none", "folded", "all"):
            raise ConfigurationError(f"rotations are 'none', 'folded' or 'all', not {self.rotations!r}")
        searches = "search" in (self.alpha, self.inner_alpha)
        reasons = {
            "a search of α": searches,
            "static activations": self.activations == "static",
            "GPTQ": self.gptq,
        }
        needs = [name for name, wanted in reasons.items() if wanted]
        if self.calibration is None and (needs or self.act_scales is None):
            raise CalibrationError(
                f"{needs[0] if needs else 'smoothing'} needs calibration text",
                hint="pass calibration_dataset, a file or a hub dataset"
                + ("" if needs else ", or act_scales, a file of activation scales"),
            )

    @property
    def scheme(self) -> Scheme:
        """What weights and inputs are rounded with."""
        size = MAX_CONVROT_GROUP if self.rotations == "all" else 0
        return Scheme("channel", "tensor" if self.activations == "static" else "token", size)
