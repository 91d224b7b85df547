"""The Core ML backend: a model directory or a traced program in, a folder with an ``.mlpackage`` out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from qwodel.backends.base import BaseQuantizer, FormatSpec, Job
from qwodel.backends.coreml.formats import CoreMLRecipe, format_specs, resolve
from qwodel.backends.coreml.options import CoreMLOptions
from qwodel.exceptions import ConfigurationError, ValidationError, did_you_mean
from qwodel.output import require_space
from qwodel.source import ModelSource

if TYPE_CHECKING:
    from qwodel.backends.coreml.mil.program import Program
    from qwodel.backends.coreml.models import ModelKind
    from qwodel.backends.coreml.weights import Weight

__all__ = ["CoreMLQuantizer"]

_PROGRAMS = frozenset({"torchscript", "exported"})


class CoreMLQuantizer(BaseQuantizer[CoreMLOptions]):
    """coremltools: its converter, its compression passes; checks that need no Mac."""

    name: ClassVar[str] = "coreml"
    extra: ClassVar[str] = "coreml"
    accepts: ClassVar[frozenset[str]] = frozenset({"huggingface"}) | _PROGRAMS
    packages: ClassVar[tuple[str, ...]] = ("coremltools", "transformers", "torch", "numpy")
    options_type = CoreMLOptions

    @classmethod
    def formats(cls) -> Mapping[str, FormatSpec]:
        """Formats of Core ML's compressed weights, by name."""
        return format_specs()

    def output_name(self, source: ModelSource, spec: FormatSpec, options: CoreMLOptions) -> str:
        """``<model>-<format>``, a directory with the package in it."""
        return f"{source.name}-{spec.name}"

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse a model that cannot be traced, with ValidationError."""
        from qwodel.backends.coreml.models import classify

        classify(config)

    def check(self, source: ModelSource, spec: FormatSpec, options: CoreMLOptions) -> None:
        """Refuse options that do not suit the model, the format or the deployment target.

        Raises:
            ConfigurationError: an option that means nothing here, or a target too old for the format.
            ValidationError: a model that cannot be traced.
        """
        from qwodel.backends.coreml.dimensions import check_options, text_dimensions
        from qwodel.backends.coreml.mil.evaluate import known_operations
        from qwodel.backends.coreml.models import ModelKind
        from qwodel.backends.coreml.programs import check_examples, check_trust

        if source.input_format in _PROGRAMS:
            check_trust(source, options)
        resolve(spec.name, options)
        kind = _kind(source)
        check_options(kind, options)
        if kind in (ModelKind.DECODER, ModelKind.ENCODER):
            text_dimensions(source.config, options)
        if source.input_format == "torchscript":
            check_examples(options)
        for operation in (*options.float32_ops, *options.exclude_ops):
            if operation not in known_operations():
                raise ConfigurationError(
                    f"there is no MIL operation {operation!r}",
                    hint=did_you_mean(operation, known_operations()),
                )

    def stage_weights(
        self, source: ModelSource, spec: FormatSpec, options: CoreMLOptions
    ) -> Mapping[str, float]:
        """Shares of time: palettes take longest, then integers, then casts."""
        quantize = {"float": 5, "linear": 30, "palette": 60}[resolve(spec.name, options).kind]
        return {"resolve": 1, "convert": 60, "quantize": quantize, "verify": 15, "publish": 1}

    def run(self, job: Job[CoreMLOptions]) -> None:
        """Trace, convert, compress the weights, write the package, and read it back."""
        from qwodel.backends.coreml.build import build
        from qwodel.backends.coreml.mil.program import Program
        from qwodel.backends.coreml.package import copy_beside, write_package
        from qwodel.backends.coreml.verify import verify
        from qwodel.backends.coreml.weights import unplaced, weights_of

        recipe = resolve(job.format.name, job.options)
        # At its largest: the float16 program twice, once of it coremltools' own copy, and the result.
        require_space(
            job.output.scratch, int(job.source.weight_bytes * 2.5), f"making {job.output.final.name}"
        )
        built = build(job, _kind(job.source), recipe)
        job.progress.update(0.98, 1, "looking at the weights")
        original = Program(built.package)
        whole = "the format is float16" if recipe.kind == "float" else None
        weights = weights_of(original, built.source, job.options, kept=whole)
        job.output.path.mkdir()
        package = job.output.path / f"{job.source.name}.mlpackage"
        write_package(self._compressed(job, recipe, original, weights), package, job, recipe, built)
        job.report |= {
            "package": package.name,
            "recipe_resolved": recipe.describe(),
            "deployment_target": recipe.target,
            "compute_units": job.options.compute_units,
            "tokens": built.dimensions.longest or None,
            "parameters": built.parameters,
            "side_files": copy_beside(job.source, job.output.path),
            "unplaced": unplaced(weights, built.source),
        }
        job.output.written()
        verify(job, recipe, built, original, weights, package, self.log)

    def _compressed(
        self, job: Job[CoreMLOptions], recipe: CoreMLRecipe, original: Program, weights: list[Weight]
    ) -> Any:
        """Return coremltools' model with its weights as the recipe has them."""
        from qwodel.backends.coreml.compress import compress, expected_seconds
        from qwodel.backends.coreml.toolchain import load_package

        if recipe.kind == "float":
            job.progress.stage("quantize", "writing the package")
            return load_package(original.package)
        count = sum(weight.kept is None for weight in weights)
        if not count:
            raise ValidationError(
                f"{job.source.name} has no weight that {recipe.format} would compress",
                hint=f"none of its matrices has more than weight_threshold={job.options.weight_threshold} "
                "elements; lower it, or take float16",
            )
        workers = job.options.workers or os.cpu_count() or 1
        seconds = expected_seconds(original, weights, recipe, workers)
        about = f", about {max(1, round(seconds))} s of k-means" if seconds else ""
        job.report["expected_kmeans_seconds"] = round(seconds, 1) if seconds else None
        self.log.info("%d weights to %s%s", count, recipe.describe(), about)
        job.progress.stage("quantize", f"{count} weights to {recipe.describe()}{about}")

        def on_bar(what: str, done: int, total: int) -> None:
            start, end = (0.0, 0.85) if "compression" in what else (0.85, 0.97)
            message = what.removeprefix("Running ").removeprefix("MIL ").strip()
            job.progress.update(
                start + (end - start) * done / max(total, 1), 1, f"{message} ({done}/{total})"
            )

        return compress(original, weights, recipe, workers, on_bar)


def _kind(source: ModelSource) -> ModelKind:
    from qwodel.backends.coreml.models import ModelKind, classify

    if source.input_format in _PROGRAMS:
        return ModelKind.PROGRAM
    if source.path.is_file():
        raise ValidationError(
            f"{source.given} is a single file", hint="give the model directory that holds it"
        )
    if not source.config:
        raise ValidationError(
            f"{source.path} has no config.json",
            hint="give the directory that save_pretrained wrote, or a hub download",
        )
    return classify(source.config)
