"""The formats: what becomes of a weight, and which systems read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from qwodel.backends.base import FormatSpec
from qwodel.backends.coreml.options import CoreMLOptions, Granularity
from qwodel.exceptions import ConfigurationError

__all__ = ["FORMATS", "CoreMLRecipe", "format_specs", "opset", "output_type", "resolve"]

_DEFAULT_GROUP = 32
_TARGETS = ("iOS15", "iOS16", "iOS17", "iOS18")
_MACOS = {"macOS12": "iOS15", "macOS13": "iOS16", "macOS14": "iOS17", "macOS15": "iOS18"}


@dataclass(frozen=True, slots=True)
class _Format:
    bits: int
    ratio: str
    description: str
    kind: Literal["float", "linear", "palette"]
    mode: str | None
    minimum: str
    granularity: Granularity | None
    sqnr_db: float
    """A weight that keeps less than this is taken for broken."""
    aliases: tuple[str, ...] = ()


FORMATS: Mapping[str, _Format] = {
    "float16": _Format(16, "~2x", "Half-precision. Minimal accuracy loss. Universal compatibility.",
                       "float", None, "iOS15", None, 55.0, ("fp16",)),
    "int8_linear": _Format(8, "~4x", "8-bit linear quantization with zero points. Good accuracy.",
                           "linear", "linear", "iOS16", "per_channel", 20.0, ("int8",)),
    "int8_symmetric": _Format(8, "~4x", "8-bit symmetric quantization. Faster ops.",
                              "linear", "linear_symmetric", "iOS16", "per_channel", 20.0),
    "int4": _Format(4, "~8x", "4-bit palettization, a palette for each 32 channels. iOS 18+ only.",
                    "palette", "kmeans", "iOS18", "per_grouped_channel", 8.0),
    "int6": _Format(6, "~5x", "6-bit palettization. Balance between int4 and int8.",
                    "palette", "kmeans", "iOS16", "per_tensor", 14.0),
}  # fmt: skip


def format_specs() -> Mapping[str, FormatSpec]:
    """Return the formats in the order of the table above."""
    return MappingProxyType(
        {
            name: FormatSpec(
                name=name,
                description=f"{each.ratio}: {each.description}",
                bits=float(each.bits),
                read_by=f"Core ML, {each.minimum.replace('iOS', 'iOS ')} and later",
                aliases=each.aliases,
            )
            for name, each in FORMATS.items()
        }
    )


@dataclass(frozen=True, slots=True)
class CoreMLRecipe:
    """A format with everything decided.

    ``target`` is the oldest system, as coremltools names it; ``group_size`` is 0 where nothing is grouped.
    """

    format: str
    kind: Literal["float", "linear", "palette"]
    bits: int
    mode: str | None
    granularity: Granularity | None
    group_size: int
    target: str
    sqnr_db: float

    def describe(self) -> str:
        """One line for people."""
        if self.kind == "float":
            return "float16 weights"
        shared = str(self.granularity).replace("_", " ")
        group = f" of {self.group_size}" if self.group_size else ""
        return f"{self.bits}-bit {'palettes' if self.kind == 'palette' else 'integers'}, {self.mode}, {shared}{group}"


def resolve(name: str, options: CoreMLOptions) -> CoreMLRecipe:
    """Decide mode, granularity, group size and deployment target of a run.

    Raises:
        ConfigurationError: an option does not suit the format, or the target is too old for it.
    """
    kind = FORMATS[name]
    granularity = _granularity(name, options)
    grouped = granularity in ("per_block", "per_grouped_channel")
    if options.group_size is not None and not grouped:
        raise ConfigurationError(
            f"group_size belongs to groups, and {name} was asked for {granularity or 'none'}"
        )
    return CoreMLRecipe(
        format=name,
        kind=kind.kind,
        bits=kind.bits,
        mode=_mode(name, options),
        granularity=granularity,
        group_size=(options.group_size or _DEFAULT_GROUP) if grouped else 0,
        target=_target(name, options, grouped),
        sqnr_db=kind.sqnr_db,
    )


def _granularity(name: str, options: CoreMLOptions) -> Granularity | None:
    kind = FORMATS[name]
    allowed: dict[str, tuple[Granularity, ...]] = {
        "float": (),
        "linear": ("per_tensor", "per_channel", "per_block"),
        "palette": ("per_tensor", "per_grouped_channel"),
    }
    known = allowed[kind.kind]
    if options.granularity is not None and options.granularity not in known:
        raise ConfigurationError(
            f"{name} has no granularity {options.granularity!r}",
            hint=f"it takes {', '.join(known)}" if known else f"{name} shares nothing: leave the option out",
        )
    if options.granularity is None and options.group_size is not None and known:
        return known[-1]
    return options.granularity or kind.granularity


def _mode(name: str, options: CoreMLOptions) -> str | None:
    kind = FORMATS[name]
    allowed = ("kmeans", "uniform") if kind.kind == "palette" else (kind.mode,) if kind.mode else ()
    if options.mode is not None and options.mode not in allowed:
        raise ConfigurationError(
            f"{name} has no mode {options.mode!r}",
            hint=f"it takes {', '.join(allowed)}"
            if allowed
            else f"{name} quantizes nothing: leave the option out",
        )
    return options.mode or kind.mode


def _target(name: str, options: CoreMLOptions, grouped: bool) -> str:
    reasons = {FORMATS[name].minimum: name}
    if grouped:
        reasons.setdefault("iOS18", f"{name} in groups")
    if options.stateful:
        reasons.setdefault("iOS18", "a stateful key-value cache")
    if options.shapes == "enumerated":
        # Two inputs have enumerated shapes, which older systems do not take.
        reasons.setdefault("iOS18", "enumerated shapes of several inputs")
    needed = max(reasons, key=_TARGETS.index)
    asked = options.deployment_target
    if asked is None:
        return needed
    if _TARGETS.index(_MACOS.get(asked, asked)) < _TARGETS.index(needed):
        same = next(mac for mac, ios in _MACOS.items() if ios == needed)
        raise ConfigurationError(
            f"deployment_target {asked} is too old: {reasons[needed]} needs {needed} ({same})",
            hint=f"pass deployment_target='{needed}' or later, or another format",
        )
    return asked


def opset(target: str) -> str:
    """Return the MIL operation set of a deployment target: iOS 15 has ``CoreML5``, and each later one the next."""
    return f"CoreML{int(_MACOS.get(target, target).removeprefix('iOS')) - 10}"


def output_type(target: str) -> str:
    """Return the type of outputs: before iOS 16 an output cannot be float16."""
    return "float32" if opset(target) == "CoreML5" else "float16"
