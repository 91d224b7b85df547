"""The last step of a run: the written package is read back, held against its source, and evaluated."""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qwodel.backends.base import Job
from qwodel.backends.coreml.build import Built
from qwodel.backends.coreml.checks import WeightCheck, check_interface, check_size, check_weights
from qwodel.backends.coreml.formats import CoreMLRecipe, opset, output_type
from qwodel.backends.coreml.mil.evaluate import Evaluator
from qwodel.backends.coreml.mil.program import Program
from qwodel.backends.coreml.options import CoreMLOptions
from qwodel.backends.coreml.probes import Agreement, Probe, Runner, agreement, steps
from qwodel.backends.coreml.weights import Weight
from qwodel.exceptions import ConversionError, IntegrityError

__all__ = ["run_written", "verify"]

_EVALUATED_PARAMETERS = 300_000_000
_FLOAT16_ERROR = 1e-2
_NORM_OPERATIONS = ("add", "mul", "pow", "reduce_mean", "rsqrt")
_FLOAT32_BYTES = 4


def verify(
    job: Job[CoreMLOptions],
    recipe: CoreMLRecipe,
    built: Built,
    original: Program,
    weights: list[Weight],
    package: Path,
    log: logging.Logger,
) -> None:
    """Check everything that can be checked without Apple's runtime, and fill the report.

    Raises:
        IntegrityError: the package is not what was asked for.
    """
    job.progress.stage("verify", "reading the package back")
    written, threshold = Program(package), job.options.weight_threshold
    kinds = {each.name: "image" if each.dtype.startswith("image") else each.dtype for each in built.inputs}
    kind = output_type(recipe.target) if built.proof is not None else None
    outputs = {each.name: kind for each in built.outputs}
    check_interface(written, kinds, outputs, len(built.states), opset(recipe.target))
    checks = check_weights(original, written, weights, recipe, threshold)
    weight_bytes = check_size(written, weights, checks, recipe, threshold)
    stored = sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
    job.report |= {
        "bits_per_weight": round(weight_bytes * 8 / max(built.parameters, 1), 3),
        "compression_ratio": round(built.parameters * _FLOAT32_BYTES / stored, 3),
        "operations": written.counts(),
        "compressed": dict(Counter(check.operation for check in checks)),
        "kept": {weight.label: weight.kept for weight in weights if weight.kept and recipe.kind != "float"},
        "groups": {check.quality.name: check.groups for check in checks},
        "sqnr_db": {check.quality.name: check.quality.reported_db for check in checks},
        "trace_error": built.proof,
    }
    _warn_of_noise(checks, recipe, log)
    job.report["evaluated"] = _evaluate(job, recipe, built, written, log)
    if sys.platform == "darwin":
        job.report["runtime"] = _compare_runtime(job, built, package)


def _warn_of_noise(checks: list[WeightCheck], recipe: CoreMLRecipe, log: logging.Logger) -> None:
    worst = min((check.quality for check in checks), key=lambda quality: quality.sqnr_db, default=None)
    if worst is not None and worst.sqnr_db < recipe.sqnr_db * 1.3:
        log.warning("%s keeps %.1f dB of %s, which is little", recipe.format, worst.sqnr_db, worst.name)


def _evaluate(
    job: Job[CoreMLOptions], recipe: CoreMLRecipe, built: Built, written: Program, log: logging.Logger
) -> dict[str, Any]:
    """Run the written program on the probes and compare it with the source's outputs."""
    wanted = job.options.evaluate
    if wanted is False or (wanted is None and built.parameters > _EVALUATED_PARAMETERS):
        return {"skipped": "not asked for" if wanted is False else "a large model; pass evaluate=True"}
    job.progress.update(1, 2, "running the written program")
    try:
        evaluator = Evaluator(written)
    except ConversionError as error:
        if wanted:
            raise
        log.warning("the written program was not run: %s", error)
        return {"skipped": str(error)}
    found = agreement(run_written(evaluator, built), built.probes, built.expected, built.outputs)
    _judge(found, evaluator.overflows)
    if recipe.kind == "float" and found.relative_error > _FLOAT16_ERROR:
        log.warning("float16 changes the outputs by %.1e of their size", found.relative_error)
    return {**found.as_dict(), "inputs": "random", "probes": [str(probe) for probe in built.probes]}


def _judge(found: Agreement, overflows: Mapping[str, str]) -> None:
    """Refuse a program whose values leave float16's range."""
    if math.isfinite(found.relative_error) and not overflows:
        return
    first = next(iter(overflows), "an output")
    kinds = sorted({*overflows.values(), *_NORM_OPERATIONS})
    raise IntegrityError(
        f"values of the written program leave float16's range, first in {first} ({overflows.get(first, 'not finite')})",
        hint=f"compute such operations in float32: float32_ops={kinds}",
    )


def run_written(evaluator: Evaluator, built: Built) -> Runner:
    """Return a runner of the written program; a stateful one is fed as its trace was."""
    names = [each.name for each in built.outputs]

    def whole(probe: Probe) -> list[torch.Tensor]:
        found = evaluator.run(probe.inputs)
        return [found[name] for name in names]

    def in_steps(probe: Probe) -> list[torch.Tensor]:
        states = evaluator.states()
        ids, mask = probe.inputs["input_ids"], probe.inputs["attention_mask"]
        parts = [
            evaluator.run({"input_ids": ids[:, a:b], "attention_mask": mask[:, :b]}, states)[names[0]]
            for a, b in steps(probe.tokens)
        ]
        return [torch.cat(parts, 1)]

    return in_steps if built.states else whole


def _compare_runtime(job: Job[CoreMLOptions], built: Built, package: Path) -> dict[str, Any]:
    """On a Mac: the same probes through Core ML itself."""
    import coremltools as ct

    units = getattr(ct.ComputeUnit, job.options.compute_units)
    model = ct.models.MLModel(str(package), compute_units=units)
    names = [each.name for each in built.outputs]

    def run(probe: Probe) -> list[torch.Tensor]:
        if built.states:
            state, parts = model.make_state(), []
            ids, mask = probe.inputs["input_ids"].numpy(), probe.inputs["attention_mask"].numpy()
            for a, b in steps(probe.tokens):
                given = {"input_ids": ids[:, a:b], "attention_mask": mask[:, :b]}
                parts.append(torch.from_numpy(model.predict(given, state)[names[0]]))
            return [torch.cat(parts, 1)]
        found = model.predict({name: _native(name, each, built) for name, each in probe.inputs.items()})
        return [torch.from_numpy(found[name]) for name in names]

    return agreement(run, built.probes, built.expected, built.outputs).as_dict()


def _native(name: str, value: torch.Tensor, built: Built) -> Any:
    """What Core ML's Python interface takes: arrays, and images as Pillow's."""
    if not any(each.name == name and each.dtype.startswith("image") for each in built.inputs):
        return value.numpy()
    from PIL import Image

    pixels = value[0].permute(1, 2, 0).byte().numpy()
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
