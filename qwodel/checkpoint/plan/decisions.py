"""What happens to one tensor, and why, from its name, dtype and shape alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from qwodel.checkpoint.families.layer_filters import filter_verdict
from qwodel.checkpoint.formats.cast import cast_to
from qwodel.checkpoint.formats.codec import Codec
from qwodel.checkpoint.formats.registry import storage_format
from qwodel.checkpoint.layouts.layout import Layout
from qwodel.checkpoint.plan.recipe import Recipe
from qwodel.checkpoint.rounding.methods import Nearest, Rounding, default_rounding
from qwodel.checkpoint.source.source_tensor import SourceTensor
from qwodel.checkpoint.tensors import Action
from qwodel.name_patterns import name_pattern

__all__ = ["Decider", "Decision", "conv1d_weights"]

_INEFFICIENT_SIDE = 128
_CONV1D = re.compile(r"\.(?:c_attn|q_attn|c_proj|c_fc)\.weight$")


@dataclass(frozen=True, slots=True)
class Decision:
    """An action and the reason for it; ``format`` and ``rounding`` where it quantizes or casts."""

    action: Action
    reason: str
    format: Codec | None = None
    rounding: Rounding | None = None


class Decider:
    """Applies a recipe to the tensors of one checkpoint.

    Args:
        recipe: what is wanted.
        filters: names of the model filters in force.
        nonfinite: names of weights that hold NaN or Inf and are to be kept.
        conv1d: names of weights stored ``[in, out]``.
        layout: whose reader's limits count; a rule that names a weight overrides these.
    """

    def __init__(
        self,
        recipe: Recipe,
        filters: tuple[str, ...],
        nonfinite: Collection[str] = (),
        conv1d: Collection[str] = (),
        layout: Layout | None = None,
    ) -> None:
        self.recipe = recipe
        self.filters = filters
        self.nonfinite = nonfinite
        self.conv1d = conv1d
        self.layout = layout

    def decide(self, source: SourceTensor) -> Decision:
        """Return the decision for one tensor; rules that name it win over filters, and shape over both."""
        verdict = filter_verdict(source.name, self.filters)
        if verdict.action == "remove":
            return Decision(Action.DROP, verdict.reason)
        if not source.is_float:
            return _keep(source, f"{source.dtype} values are not weights")
        if source.name in self.nonfinite:
            return _keep(source, "holds NaN or Inf")
        if self.recipe.exclude_layers and name_pattern(self.recipe.exclude_layers).search(source.name):
            return _keep(source, f"exclude_layers: {self.recipe.exclude_layers}")
        return self._named(source) or self._unnamed(source)

    def _named(self, source: SourceTensor) -> Decision | None:
        """What a rule that matches the tensor's name says."""
        recipe = self.recipe
        if recipe.layer_config:
            found = recipe.layer_config.rule_for(source.name, fullmatch=recipe.layer_config_fullmatch)
            if found:
                pattern, rule = found
                reason = f"layer config: {pattern}"
                if rule.skip:
                    return _keep(source, reason)
                wanted = recipe.format
                if rule.storage_name:
                    wanted = storage_format(rule.storage_name)
                if rule.block_size and wanted.granularity.is_block:
                    wanted = wanted.with_block_size(rule.block_size)
                if wanted.cast_to or not self._obstacle(source, wanted):
                    return self._store(source, wanted, recipe.rounding, reason)
        custom = recipe.custom_layers
        if custom and name_pattern(custom.pattern).search(source.name):
            obstacle = None if custom.format.cast_to else self._obstacle(source, custom.format)
            if not obstacle and custom.skip_inefficient:
                obstacle = _inefficient(source, custom.format)
            if not obstacle:
                return self._store(source, custom.format, custom.rounding, f"custom_layers: {custom.pattern}")
        return None

    def _unnamed(self, source: SourceTensor) -> Decision:
        """What shape and filters say."""
        recipe, wanted = self.recipe, self.recipe.format
        if wanted.cast_to:
            return self._store(source, wanted, recipe.rounding, "every weight is cast")
        if obstacle := self._obstacle(source, wanted):
            return _keep(source, obstacle)
        verdict = filter_verdict(source.name, self.filters)
        reason = None if verdict.action == "process" else verdict.reason
        if not reason and recipe.skip_inefficient_layers:
            reason = _inefficient(source, wanted)
        if not reason:
            reason = self._unreadable(source, wanted)
        if not reason:
            return self._store(source, wanted, recipe.rounding, "matrix that no filter keeps")
        fallback, safe = recipe.fallback, reason.startswith("safe default")
        if fallback and (fallback.cast_to or not (safe or self._unreadable(source, fallback))):
            return self._store(source, fallback, recipe.fallback_rounding, f"fallback; {reason}")
        return _keep(source, reason)

    def _unreadable(self, source: SourceTensor, wanted: Codec) -> str | None:
        """Why the layout's reader would not take this tensor so."""
        return self.layout.obstacle(source, wanted) if self.layout else None

    def _obstacle(self, source: SourceTensor, wanted: Codec) -> str | None:
        """Why this tensor cannot be quantized so at all."""
        if not source.name.endswith(".weight"):
            return "expert tensor without a quantized layout" if len(source.shape) == 3 else "not a .weight"
        if len(source.shape) != 2:
            return f"{len(source.shape)}-D, not a matrix"
        if 0 in source.shape:
            return "empty"
        if source.name in self.conv1d:
            return "stored [in, out] (Conv1D); readers of quantized weights take [out, in]"
        if self.layout is None:
            return None
        storage = self.layout.storage(source, wanted)
        return storage.codec.obstacle(source.shape, storage.dialect)

    def _store(self, source: SourceTensor, wanted: Codec, rounding: Rounding | None, reason: str) -> Decision:
        if wanted.quantizes:
            wanted = wanted.fitting(source.shape[1])
            rounding = rounding or default_rounding(wanted.quant_type, wanted.granularity)
            return Decision(Action.QUANTIZE, reason, wanted, rounding)
        if source.decoder is None and source.dtype == wanted.cast_to:
            return Decision(Action.COPY, f"already {wanted.cast_to}")
        return Decision(Action.CAST, reason, wanted, Nearest())


def conv1d_weights(sources: Iterable[SourceTensor]) -> frozenset[str]:
    """Return the names of GPT-2's transposed weights: there a fused ``c_attn`` is ``[d, 3d]``."""
    matrices = [each for each in sources if len(each.shape) == 2 and _CONV1D.search(each.name)]
    fused = [each for each in matrices if each.name.endswith(".c_attn.weight")]
    if any(each.shape[1] == 3 * each.shape[0] for each in fused):
        return frozenset(each.name for each in matrices)
    return frozenset()


def _inefficient(source: SourceTensor, wanted: Codec) -> str | None:
    side = wanted.granularity.block_cols or _INEFFICIENT_SIDE
    if any(n < side for n in source.shape):
        return f"a side is below {side}"
    if any(n % side for n in source.shape):
        return f"a side is not a multiple of {side}"
    return None


def _keep(source: SourceTensor, reason: str) -> Decision:
    if source.decoder is None:
        return Decision(Action.COPY, reason)
    target = cast_to(source.dtype)
    return Decision(Action.CAST, f"{reason}; decoded from {source.encoding}", target, Nearest())
