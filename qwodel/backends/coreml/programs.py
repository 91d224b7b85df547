"""TorchScript files and exported programs: loaded, with the inputs they are given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qwodel.backends.coreml.options import CoreMLOptions
from qwodel.backends.coreml.wrappers import Input
from qwodel.exceptions import ConfigurationError, ConversionError, ValidationError
from qwodel.source import INPUT_FORMATS, ModelSource
from qwodel.torch_pickle import check_torch_file
from qwodel.untrusted import checked_path, open_regular

__all__ = ["LoadedProgram", "check_examples", "check_trust", "load_program"]


_EXAMPLES = (
    "pass tensors, or a .pt, .safetensors or .npz file of them; for one float input input_shape is enough"
)


_WHAT_RUNS = {
    "exported": "torch.export.load unpickles its sample inputs and evaluates its expressions as Python",
    "torchscript": "its functions may write and read files (aten::save, aten::from_file), the first as torch.jit.load opens it",
}


def check_trust(source: ModelSource, options: CoreMLOptions) -> None:
    """Raise ValidationError for a program whose maker the user does not say to trust.

    torch has no way to open either kind without running what is in it.
    """
    if not options.trust_program:
        raise ValidationError(
            f"{source.given} is {INPUT_FORMATS[source.input_format]}, and opening it can run code: "
            f"{_WHAT_RUNS[source.input_format]}",
            hint="if you made it, or trust who did, pass trust_program=True (-O trust_program=true); else give "
            "the model's directory with safetensors",
        )


def check_examples(options: CoreMLOptions) -> None:
    """Raise ConfigurationError where nothing says what a TorchScript file takes, and read what does."""
    if options.example_inputs is None and "input_shape" not in options.model_fields_set:
        raise ConfigurationError("a TorchScript file needs example_inputs", hint=_EXAMPLES)
    if isinstance(options.example_inputs, str):
        _read(checked_path(options.example_inputs, "file of example_inputs"))


class LoadedProgram:
    """A program with example inputs.

    Attributes:
        program: what coremltools converts.
        module: the same as a module, for reference outputs and weights.
        examples: inputs by name, in order.
        inputs: their descriptions.
    """

    def __init__(self, program: Any, module: torch.nn.Module, examples: Mapping[str, torch.Tensor]) -> None:
        self.program, self.module, self.examples = program, module, dict(examples)
        self.inputs = tuple(
            Input(name, tuple(each.shape), "float32" if each.is_floating_point() else "int32", "")
            for name, each in self.examples.items()
        )


def load_program(source: ModelSource, options: CoreMLOptions) -> LoadedProgram:
    """Load a TorchScript file or an exported program in evaluation mode.

    Raises:
        ValidationError: the file is not said to be trusted.
        ConfigurationError: no example inputs are given, or they do not fit the program.
        ConversionError: torch cannot load the file.
    """
    check_trust(source, options)
    file = source.weight_files[0]
    try:
        if source.input_format == "torchscript":
            module = torch.jit.load(str(file), map_location="cpu").eval()  # type: ignore[no-untyped-call]
            program = module
            names = [each.name for each in module.forward.schema.arguments[1:]]
            stored: tuple[Any, ...] = ()
        else:
            exported = torch.export.load(file)
            program = exported.run_decompositions({})
            module = exported.module()
            names = list(exported.graph_signature.user_inputs)
            stored = tuple(exported.example_inputs[0]) if exported.example_inputs else ()
    except Exception as error:
        raise ConversionError(
            f"torch {torch.__version__} cannot load {file.name}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}",
            hint="save it again with this torch release",
        ) from error
    return LoadedProgram(program, module, _examples(names, stored, options))


def _examples(names: list[str], stored: tuple[Any, ...], options: CoreMLOptions) -> dict[str, torch.Tensor]:
    clean = [re.sub(r"\W", "_", name) for name in names]
    given = options.example_inputs
    if isinstance(given, str):
        given = _read(checked_path(given, "file of example_inputs"))
    if given is None and stored:
        given = stored
    if given is None and len(clean) == 1 and "input_shape" in options.model_fields_set:
        given = torch.rand(options.input_shape, generator=torch.Generator().manual_seed(0))
    if given is None:
        raise ConfigurationError(f"the program needs example_inputs for {', '.join(clean)}", hint=_EXAMPLES)
    if isinstance(given, Mapping):
        if set(given) != set(clean):
            raise ConfigurationError(
                f"example_inputs has {', '.join(given)}, and the program takes {', '.join(clean)}"
            )
        values = [given[name] for name in clean]
    else:
        values = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(values) != len(clean):
        raise ConfigurationError(
            f"example_inputs has {len(values)} tensors, and the program takes {len(clean)}: {', '.join(clean)}"
        )
    return {name: torch.as_tensor(value) for name, value in zip(clean, values, strict=True)}


def _read(file: Path) -> Any:
    if not file.is_file():
        raise ConfigurationError(f"example_inputs: {file} does not exist")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        if file.suffix == ".npz":
            import numpy as np

            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        with open_regular(file, error=ConfigurationError) as stream:
            check_torch_file(stream, str(file))
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigurationError(f"example_inputs: {file} cannot be read: {error}") from error
