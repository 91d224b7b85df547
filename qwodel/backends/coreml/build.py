"""A source → a float16 package in the scratch folder, proved and with the torch model gone."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwodel.backends.base import Job
from qwodel.backends.coreml.convert import convert_program, convert_traced, trace
from qwodel.backends.coreml.dimensions import Dimensions, image_shape, text_dimensions
from qwodel.backends.coreml.fingerprints import SourceTensors
from qwodel.backends.coreml.formats import CoreMLRecipe
from qwodel.backends.coreml.mil.program import Program
from qwodel.backends.coreml.models import ModelKind, load_model
from qwodel.backends.coreml.options import CoreMLOptions
from qwodel.backends.coreml.probes import Probe, Runner, prove, references, run_module, text_probes
from qwodel.backends.coreml.programs import load_program
from qwodel.backends.coreml.toolchain import BarCallback, record_log
from qwodel.backends.coreml.weights import check_exclusions
from qwodel.backends.coreml.wrappers import (
    Input,
    Output,
    State,
    Traceable,
    outputs_of,
    wrap_decoder,
    wrap_encoder,
    wrap_vision,
)
from qwodel.process_state import quiet_transformers
from qwodel.progress import Progress
from qwodel.untrusted import checked_number, kind_of, read_json_object

__all__ = ["Built", "build"]

_BARS = (("PyTorch", 0.25, 0.5), ("frontend", 0.5, 0.55), ("default", 0.55, 0.93), ("backend", 0.93, 0.97))
_HALF = (0.5, 0.5, 0.5)
_NORMALIZATION = ("image_mean", "image_std")


@dataclass(frozen=True)
class Built:
    """A float16 package, and what must be known of its source once that is gone.

    ``proof`` is the largest relative error of the trace on the probes, ``None`` where nothing was wrapped.
    """

    package: Path
    dimensions: Dimensions
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    states: tuple[State, ...]
    source: SourceTensors
    parameters: int
    probes: list[Probe]
    expected: list[list[torch.Tensor]]
    proof: float | None


def build(job: Job[CoreMLOptions], kind: ModelKind, recipe: CoreMLRecipe) -> Built:
    """Load, wrap, prove, trace, convert and save.

    Raises:
        ConversionError: one of these steps fails; the message says which operator or module.
    """
    job.progress.stage("convert", f"loading {job.source.name}")
    with quiet_transformers():
        built = _build_program(job, recipe) if kind is ModelKind.PROGRAM else _build_model(job, kind, recipe)
    gc.collect()  # traces refer to themselves
    return built


def _build_model(job: Job[CoreMLOptions], kind: ModelKind, recipe: CoreMLRecipe) -> Built:
    options, progress = job.options, job.progress
    model = load_model(job.source, options)
    parameters = sum(each.numel() for each in model.parameters())
    progress.update(0.1, 1, "comparing the traced model with the original")
    outputs = outputs_of(kind, model)
    if kind is ModelKind.VISION:
        shape = image_shape(model.config.to_dict(), options)
        processor = _processor(job, shape[1])
        dimensions, probes = Dimensions(1), _image_probes(shape)
        expected = references(_original_of_images(model, *processor), probes, outputs)
        traceable = wrap_vision(model, shape=shape, scale=processor[0], mean=processor[1], std=processor[2])
    else:
        config = model.config
        dimensions = text_dimensions({**config.to_dict(), **job.source.config}, options)
        probes = _text_probes(config, dimensions, options)
        expected = references(_original_of_text(model, len(outputs)), probes, outputs)
        traceable = _wrap_text(model, kind, dimensions, options)
    # The wrapper has tables that the model had not.
    tensors = SourceTensors.of(traceable.module, options.weight_threshold, "model.")
    check_exclusions(tensors, options)
    traced = trace(traceable, dimensions)
    proof = prove("the traced model", run_module(traced, traceable), probes, expected, outputs)
    for state in traceable.states:
        getattr(traced, state.name).zero_()
    progress.update(0.25, 1, "converting")
    converted = convert_traced(traced, traceable, dimensions, recipe.target, options, _bars(progress))
    return Built(
        _save(job, converted), dimensions, traceable.inputs, outputs, traceable.states, tensors, parameters,
        probes, expected, proof,
    )  # fmt: skip


def _wrap_text(model: Any, kind: ModelKind, dimensions: Dimensions, options: CoreMLOptions) -> Traceable:
    with torch.no_grad():
        if kind is ModelKind.ENCODER:
            return wrap_encoder(model, length=dimensions.longest, token_type_ids=options.token_type_ids)
        return wrap_decoder(
            model, length=dimensions.longest, batch=dimensions.batch, stateful=options.stateful
        )


def _text_probes(config: Any, dimensions: Dimensions, options: CoreMLOptions) -> list[Probe]:
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return text_probes(
        dimensions.probe_lengths(window),
        batch=dimensions.batch,
        vocabulary=config.vocab_size,
        pad=getattr(config, "pad_token_id", None),
        segments=options.token_type_ids,
        padded=not options.stateful,
    )


def _original_of_text(model: Any, outputs: int) -> Runner:
    """The untouched model, called as everybody calls it."""

    def run(probe: Probe) -> list[torch.Tensor]:
        found = model(**{name: each.long() for name, each in probe.inputs.items()}, return_dict=True)
        return list(found.to_tuple()[:outputs])

    return run


def _original_of_images(model: Any, scale: float, mean: torch.Tensor, std: torch.Tensor) -> Runner:
    """The untouched model on images normalized as its processor does."""

    def run(probe: Probe) -> list[torch.Tensor]:
        planes = [(plane * scale - mean[at]) / std[at] for at, plane in enumerate(probe.inputs["image"][0])]
        return [model(pixel_values=torch.stack(planes)[None], return_dict=True).to_tuple()[0]]

    return run


def _image_probes(shape: tuple[int, ...]) -> list[Probe]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, shape, generator=generator).float()
    ramp = torch.linspace(0, 255, shape[2] * shape[3]).reshape(1, 1, *shape[2:]).expand(shape).round()
    return [Probe({"image": image.contiguous()}) for image in (noise, ramp)]


def _processor(job: Job[CoreMLOptions], channels: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Return the image processor's factor, mean and deviation; without one, pixels become −1 … 1."""
    file = job.source.path / "preprocessor_config.json"
    config = read_json_object(file) if kind_of(file) == "file" else {}
    factor = checked_number(config.get("rescale_factor", 1 / 255), f"{file}: rescale_factor")
    scale = factor if config.get("do_rescale", True) else 1.0
    if not config.get("do_normalize", True):
        return scale, torch.zeros(channels), torch.ones(channels)
    mean, std = (_of_channels(config.get(key, _HALF[:channels]), f"{file}: {key}") for key in _NORMALIZATION)
    return scale, torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)


def _of_channels(given: Any, what: str) -> list[float]:
    values = list(given) if isinstance(given, list | tuple) else [given]
    return [checked_number(value, what) for value in values]


def _build_program(job: Job[CoreMLOptions], recipe: CoreMLRecipe) -> Built:
    options, progress = job.options, job.progress
    loaded = load_program(job.source, options)
    tensors = SourceTensors.of(loaded.module, options.weight_threshold)
    check_exclusions(tensors, options)
    progress.update(0.25, 1, "converting")
    found = loaded.module(*loaded.examples.values())
    wanted = list(found) if isinstance(found, (tuple, list)) else [found]
    names, examples = list(loaded.examples), tuple(loaded.examples.values())
    converted = convert_program(loaded.program, names, recipe.target, options, _bars(progress), examples)
    package = _save(job, converted)
    outputs = tuple(Output(name, "", per_token=False) for name in Program(package).outputs)
    probe = Probe(loaded.examples)
    expected = references(lambda _: wanted, [probe], outputs)
    return Built(
        package, Dimensions(1), loaded.inputs, outputs, (), tensors,
        sum(each.numel() for each in loaded.module.parameters()), [probe], expected, None,
    )  # fmt: skip


def _bars(progress: Progress) -> BarCallback:
    """Give each of coremltools' bars its part of the stage."""

    def report(what: str, done: int, total: int) -> None:
        start, end = next(((a, b) for key, a, b in _BARS if key in what), (0.25, 0.25))
        message = what.removeprefix("Running MIL ").replace("==>", "→")
        progress.update(
            start + (end - start) * done / max(total, 1), 1, f"{message.strip()} ({done}/{total})"
        )

    return report


def _save(job: Job[CoreMLOptions], converted: Any) -> Path:
    package = job.output.scratch / "float16.mlpackage"
    with record_log():
        converted.save(str(package))
    return package
