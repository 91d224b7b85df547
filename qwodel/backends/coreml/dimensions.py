"""Sizes a package takes, from the options and the model's context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwodel.backends.coreml.models import ModelKind
from qwodel.backends.coreml.options import CoreMLOptions
from qwodel.exceptions import ConfigurationError
from qwodel.model_config import context_length

__all__ = ["Dimensions", "check_options", "image_shape", "text_dimensions"]

_TEXT_ONLY = ("seq_length", "shapes", "lengths", "stateful", "token_type_ids")
_SHORTEST_ENUMERATED = 16


@dataclass(frozen=True)
class Dimensions:
    """Sizes a package takes.

    ``traced`` and ``longest`` are numbers of tokens (0 where there are none); ``lengths`` lists
    all of them where they are enumerated, ``fixed`` says that only ``longest`` is taken.
    """

    batch: int
    traced: int = 0
    longest: int = 0
    lengths: tuple[int, ...] = ()
    fixed: bool = False

    def probe_lengths(self, window: int | None = None) -> list[int]:
        """Numbers of tokens to compare outputs at; one passes the attention ``window`` where it can."""
        if self.fixed:
            return [self.longest]
        if self.lengths:
            return sorted({self.lengths[0], self.lengths[len(self.lengths) // 2]})
        wanted = {1, 5, 17, min(self.traced, 48)}
        if window is not None and window < self.longest:
            wanted.add(window + 3)
        return sorted({min(length, self.longest) for length in wanted})


def text_dimensions(config: Mapping[str, Any], options: CoreMLOptions) -> Dimensions:
    """Decide numbers of tokens: what was asked, within the model's context.

    Raises:
        ConfigurationError: what was asked does not fit together, or not into the context.
    """
    given = options.model_fields_set
    if len(options.input_shape) != 2:
        raise ConfigurationError(
            f"input_shape {options.input_shape} is not (batch, tokens)",
            hint="a model of text takes two sizes, such as (1, 512)",
        )
    batch, tokens = options.input_shape
    longest, context = options.seq_length, context_length(config)
    if context is not None and longest > context:
        if "seq_length" in given:
            raise ConfigurationError(
                f"seq_length {longest} is more than the model's context of {context} tokens",
                hint=f"pass at most {context}",
            )
        longest = context
    if "input_shape" not in given:
        tokens = min(tokens, longest)
    elif tokens > longest:
        raise ConfigurationError(
            f"input_shape asks for {tokens} tokens, and the model takes {longest} at most",
            hint=f"pass a shorter input_shape{'' if context == longest else ', or a larger seq_length'}",
        )
    if options.shapes == "fixed":
        longest = tokens if "input_shape" in given else longest
        return Dimensions(batch, longest, longest, fixed=True)
    if options.shapes == "enumerated":
        lengths = _enumerated(options, longest)
        return Dimensions(batch, lengths[-1], lengths[-1], lengths)
    return Dimensions(batch, tokens, longest)


def _enumerated(options: CoreMLOptions, longest: int) -> tuple[int, ...]:
    if options.lengths is None:
        powers = [1 << power for power in range(longest.bit_length()) if 1 << power >= _SHORTEST_ENUMERATED]
        return tuple(sorted({*(each for each in powers if each <= longest), longest}))
    if max(options.lengths) > longest:
        raise ConfigurationError(
            f"lengths has {max(options.lengths)} tokens, and the model takes {longest} at most",
            hint="pass shorter lengths, or a larger seq_length",
        )
    return tuple(sorted(set(options.lengths)))


def image_shape(config: Mapping[str, Any], options: CoreMLOptions) -> tuple[int, ...]:
    """Return ``(1, channels, height, width)``: what was asked, or the size the model was trained with.

    Raises:
        ConfigurationError: the shape is not that of one image, or of other channels than the model's.
    """
    channels = int(config.get("num_channels") or 3)
    if "input_shape" in options.model_fields_set:
        shape = options.input_shape
        if len(shape) != 4 or shape[0] != 1 or shape[1] != channels:
            raise ConfigurationError(
                f"input_shape {shape} is not that of one image with {channels} channels",
                hint=f"pass (1, {channels}, height, width)",
            )
        return shape
    size = config.get("image_size") or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return 1, channels, int(height), int(width)


def check_options(kind: ModelKind, options: CoreMLOptions) -> None:
    """Raise ConfigurationError where an option means nothing to this kind of model."""
    given = options.model_fields_set
    misplaced = [
        name for name in _TEXT_ONLY if name in given and kind in (ModelKind.VISION, ModelKind.PROGRAM)
    ]
    if kind is not ModelKind.DECODER and options.stateful:
        misplaced = ["stateful"]
    if kind is not ModelKind.ENCODER and options.token_type_ids:
        misplaced = ["token_type_ids"]
    if kind is not ModelKind.PROGRAM and options.example_inputs is not None:
        misplaced = ["example_inputs"]
    if misplaced:
        raise ConfigurationError(
            f"{', '.join(misplaced)} {'means' if len(misplaced) == 1 else 'mean'} nothing to {'an' if kind is ModelKind.ENCODER else 'a'} {kind.value}",
            hint="leave the option out",
        )
    if options.stateful and options.shapes != "range":
        raise ConfigurationError(
            "a stateful model takes any number of tokens, and shapes asks for some",
            hint="pass shapes='range'",
        )
