"""Which weights of a program are compressed, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwodel.backends.coreml.fingerprints import SourceTensors, fingerprint
from qwodel.backends.coreml.mil.program import MilOperation, Program
from qwodel.backends.coreml.options import CoreMLOptions
from qwodel.exceptions import ConfigurationError, did_you_mean
from qwodel.name_patterns import name_pattern

__all__ = ["Weight", "check_exclusions", "unplaced", "weights_of"]

_WEIGHT_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight",), "conv": ("weight",), "conv_transpose": ("weight",), "gather": ("x",),
    "matmul": ("x", "y"), "lstm": ("weight_ih", "weight_hh"), "gru": ("weight_ih", "weight_hh"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weight:
    """A large constant of a program.

    ``parameters`` are its names in the source, ``kept`` says why it stays as it is (``None``: it is compressed).
    """

    name: str
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    operations: tuple[str, ...]
    kept: str | None

    @property
    def label(self) -> str:
        """The source's name where there is one, else the program's."""
        return self.parameters[0] if self.parameters else self.name


def weights_of(
    program: Program, source: SourceTensors, options: CoreMLOptions, *, kept: str | None = None
) -> list[Weight]:
    """List the floating constants of more than ``weight_threshold`` elements.

    Args:
        program: the float16 program.
        source: what it was made from.
        options: threshold and exclusions.
        kept: why no weight at all is compressed, where none is.

    Raises:
        ConfigurationError: ``exclude_ops`` names an operation that reads no weight here.
    """
    consumers = program.consumers()
    found = []
    for name, kind in program.constants.items():
        if kind.dtype not in ("FLOAT16", "FLOAT32") or kind.numel <= options.weight_threshold:
            continue
        print_ = fingerprint(program.constant(name))
        readers = consumers.get(name, [])
        shape = tuple(size for size in kind.shape if size is not None)
        weight = Weight(
            name,
            source.parameters.get(print_, ()),
            shape,
            tuple(sorted({each.type for each in readers})),
            kept or _kept(name, shape, readers, print_ in source.buffers),
        )
        found.append(_excluded(weight, options))
    for operation in options.exclude_ops:
        if not any(operation in weight.operations for weight in found):
            known = sorted({each for weight in found for each in weight.operations})
            raise ConfigurationError(
                f"exclude_ops: no weight of this model goes into {operation!r}",
                hint=did_you_mean(operation, known) or f"weights go into {', '.join(known)}",
            )
    return found


def unplaced(weights: list[Weight], source: SourceTensors) -> list[str]:
    """Return the large parameters of the source whose values are in no constant of the program.

    Such a parameter is not used by the outputs that were converted (a pooler), or was fused into another.
    """
    placed = {name for weight in weights for name in weight.parameters}
    return sorted(set(source.names) - placed)


def _kept(name: str, shape: tuple[int, ...], readers: list[MilOperation], is_buffer: bool) -> str | None:
    if is_buffer:
        return "a table of the model, not a weight"
    if len(shape) < 2:
        return "a vector"
    if not any(
        name == operation.inputs.get(parameter)
        for operation in readers
        for parameter in _WEIGHT_PARAMETERS.get(operation.type, ())
    ):
        return f"used by {', '.join(sorted({each.type for each in readers})) or 'nothing'}"
    return None


def _excluded(weight: Weight, options: CoreMLOptions) -> Weight:
    if weight.kept is not None:
        return weight
    reason = None
    if any(operation in options.exclude_ops for operation in weight.operations):
        reason = "exclude_ops"
    elif any(_matches(pattern, name) for pattern in options.exclude_layers for name in weight.parameters):
        reason = "exclude_layers"
    return Weight(weight.name, weight.parameters, weight.shape, weight.operations, reason)


def _matches(pattern: str, name: str) -> bool:
    """Whether a parameter is, or belongs to, the named layer; ``re:`` begins an expression."""
    if pattern.startswith("re:"):
        return name_pattern(pattern[3:]).search(name)
    return name == pattern or name.startswith(f"{pattern}.")


def check_exclusions(source: SourceTensors, options: CoreMLOptions) -> None:
    """Raise ConfigurationError where ``exclude_layers`` names nothing of the model."""
    for pattern in options.exclude_layers:
        if not any(_matches(pattern, name) for name in source.names):
            layers = [name.removesuffix(".weight") for name in source.names]
            raise ConfigurationError(
                f"exclude_layers: no weight of the model matches {pattern!r}",
                hint=did_you_mean(pattern, layers) or f"names look like {layers[0] if layers else '(none)'}",
            )
