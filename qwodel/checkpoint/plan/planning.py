"""Planning a conversion from headers: what happens to every tensor, and where it goes, before any work starts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwodel.checkpoint.families.model_family import ModelFamily, detect_family
from qwodel.checkpoint.files.model_directory import ModelDirectory
from qwodel.checkpoint.files.output_tensor import OutputTensor, Role
from qwodel.checkpoint.files.writer import FilePlan, pack_files
from qwodel.checkpoint.formats.cast import cast_to
from qwodel.checkpoint.layouts.layout import Layout
from qwodel.checkpoint.lora.merge import LoraTerm, plan_merges
from qwodel.checkpoint.plan.decisions import Decider, Decision, conv1d_weights
from qwodel.checkpoint.plan.plan import Plan
from qwodel.checkpoint.plan.recipe import Recipe
from qwodel.checkpoint.source.checkpoint import Checkpoint
from qwodel.checkpoint.source.nonfinite import nonfinite_weights
from qwodel.checkpoint.source.source_tensor import SourceTensor
from qwodel.checkpoint.tensors import Action, TensorPlan
from qwodel.exceptions import ConfigurationError, ValidationError
from qwodel.untrusted import checked_path

__all__ = ["build_plan"]

log = logging.getLogger(__name__)


def build_plan(source: Path | Checkpoint, recipe: Recipe, layout: Layout) -> Plan:
    """Decide what happens to every tensor of ``source``.

    Only headers are read, besides scalar marks and, with ``nonfinite="keep"``,
    the weights themselves.

    Args:
        source: a file or directory, or what has been learnt of it already.

    Raises:
        ValidationError: the source is no checkpoint, or is quantized in a way not
            understood, or nothing in it can be quantized.
        ConfigurationError: the layout cannot express the format.
        IntegrityError: a file is damaged.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.of(checked_path(source))
    if layout.needs_config and checkpoint.directory.config is None:
        raise ConfigurationError(
            f"{checkpoint.path} has no config.json, which the {layout.name} layout describes the quantization in",
            hint="use the comfyui layout, or give the model's directory",
        )
    weights = checkpoint.sources.tensors
    family = detect_family(each.name for each in weights)
    filters = family.filters if recipe.filters is None else recipe.filters
    decider = Decider(recipe, filters, conv1d=conv1d_weights(weights), layout=layout)
    decisions = {each.name: decider.decide(each) for each in weights}
    with checkpoint.open() as reader:
        metadata = reader.metadata()
        if recipe.nonfinite == "keep":
            candidates = [each for each in weights if decisions[each.name].format]
            decider.nonfinite = nonfinite_weights(reader, candidates)
            decisions |= {name: decider.decide(each) for each in candidates if (name := each.name)}
    return _assemble(checkpoint, recipe, layout, metadata, family, decisions)


def _assemble(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layout: Layout,
    metadata: dict[str, str],
    family: ModelFamily,
    decisions: Mapping[str, Decision],
) -> Plan:
    weights = checkpoint.sources.tensors
    shapes = {each.name: each.shape for each in weights if each.is_float}
    merges, unmatched = plan_merges(
        recipe.loras, shapes, dampen=recipe.dampen_loras, allow_unmatched=recipe.allow_unmatched_loras
    )
    tensors = tuple(
        _tensor_plan(each, decisions[each.name], layout, merges.get(each.name, ())) for each in weights
    )
    if recipe.format.quantizes:
        _check_quantizes(checkpoint.path, tensors)
    constants = layout.extra_tensors(tensors)
    groups = [*(each.outputs for each in tensors if each.outputs), constants]
    _check_names(groups)
    limit = None if layout.single_file else recipe.max_shard_size
    files = pack_files(groups, layout.metadata(tensors, metadata), limit)
    documents, side_files = _beside(layout, checkpoint.directory, tensors, files)
    warnings = _warnings(recipe, layout, tensors, unmatched)
    return Plan(
        checkpoint,
        recipe,
        layout,
        tensors,
        files,
        documents,
        side_files,
        constants,
        family,
        warnings,
    )


def _tensor_plan(
    source: SourceTensor, decision: Decision, layout: Layout, loras: tuple[LoraTerm, ...]
) -> TensorPlan:
    outputs: tuple[OutputTensor, ...]
    action, wanted, storage = decision.action, decision.format, None
    if action is Action.DROP:
        outputs = ()
    elif action is Action.QUANTIZE and wanted:
        outputs, storage = layout.outputs(source, wanted), layout.storage(source, wanted)
    else:
        if action is Action.COPY and loras:
            action, wanted = Action.CAST, cast_to(source.dtype)
        dtype = wanted.cast_to if wanted and wanted.cast_to else source.dtype
        outputs = (OutputTensor(source.name, dtype, source.shape, Role.DATA),)
    return TensorPlan(source, action, decision.reason, outputs, wanted, decision.rounding, loras, storage)


def _check_quantizes(source: Path, tensors: Sequence[TensorPlan]) -> None:
    if any(each.action is Action.QUANTIZE for each in tensors):
        return
    reasons = Counter(each.reason for each in tensors if len(each.source.shape) > 1)
    commonest = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
    raise ValidationError(
        f"nothing in {source} would be quantized: {commonest or 'it holds no matrices'}",
        hint="it may hold no linear layers, or the filters and patterns keep them all",
    )


def _beside(
    layout: Layout, directory: ModelDirectory, tensors: Sequence[TensorPlan], files: Sequence[FilePlan]
) -> tuple[dict[str, bytes], dict[str, Path]]:
    """What goes beside the weights: documents to write, and files to copy."""
    if not layout.needs_config or directory.config is None:
        return {}, {}
    return layout.documents(directory.config, tensors, files), directory.side_files()


def _check_names(groups: list[tuple[OutputTensor, ...]]) -> None:
    counts = Counter(tensor.name for group in groups for tensor in group)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValidationError(
            f"the source has a tensor {twice[0]!r} of its own, which the output needs for a scale",
            hint="this checkpoint looks partly quantized; start from the original",
        )


def _warnings(
    recipe: Recipe, layout: Layout, tensors: tuple[TensorPlan, ...], unmatched: list[str]
) -> tuple[str, ...]:
    warnings = []
    for wanted in dict.fromkeys(each.format for each in tensors if each.format and each.format.quantizes):
        support = layout.support(wanted)
        if not support.loads:
            warnings.append(f"{support.reader} cannot load {wanted}: {support.reason}")
    kept, forced = _reader_limits(recipe, layout, tensors)
    warnings += [f"{count} weights are not {recipe.format}: {reason}" for reason, count in kept.items()]
    warnings += [f"{count} weights cannot be loaded: {reason}" for reason, count in forced.items()]
    if unmatched:
        warnings.append(
            f"{len(unmatched)} LoRA layers fit no weight and are not merged: {', '.join(unmatched[:5])}"
        )
    for warning in warnings:
        log.warning(warning)
    return tuple(warnings)


def _reader_limits(
    recipe: Recipe, layout: Layout, tensors: tuple[TensorPlan, ...]
) -> tuple[Counter[str], Counter[str]]:
    """Count weights by what keeps the reader from them: left out for it, and quantized in spite of it."""
    kept: Counter[str] = Counter()
    forced: Counter[str] = Counter()
    for each in tensors:
        if len(each.source.shape) != 2:
            continue
        quantized = each.format if each.format and each.format.quantizes else None
        reason = layout.obstacle(each.source, quantized or recipe.format)
        if reason and quantized:
            forced[reason] += 1
        elif reason and reason in each.reason:
            kept[reason] += 1
    return kept, forced
