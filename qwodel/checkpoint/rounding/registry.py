"""Every rounding method by the name users write, with the settings that are its own.

A new method is a class beside those of :mod:`qwodel.checkpoint.rounding.methods`, in a module of its own, and its
entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from qwodel.algorithms.converter_options import rounding_options
from qwodel.algorithms.data_aware import DataAware, Method
from qwodel.algorithms.gptq import GptqOptions
from qwodel.checkpoint.rounding.methods import Learned, Nearest, Rounding, ScaleSearch
from qwodel.exceptions import ConfigurationError, did_you_mean

__all__ = ["COLUMN_SETTINGS", "LEARNED_SETTINGS", "METHODS", "RoundingMethod", "rounding_method"]

COLUMN_SETTINGS = ("damping", "act_order")
"""Settings of methods that round column by column; see :class:`~qwodel.algorithms.gptq_options.GptqOptions`."""

LEARNED_SETTINGS = ("num_iter", "lr", "lr_schedule", "top_p", "min_k", "max_k", "full_matrix", "seed")
"""Settings of learned rounding; see :class:`~qwodel.algorithms.learned_rounding.RoundingOptions`."""

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RoundingMethod:
    """One entry.

    Attributes:
        name: what users write.
        summary: what it does, for ``list-options``.
        settings: names of the settings that are its own.
        alone: the rounding that goes by the weight alone; ``None`` where the method needs data, and scales
            are searched and codes rounded instead.
        with_data: how codes are found where the layer's inputs are known; ``None`` where it makes no use of them.
        follows_errors: it needs the model run, as it makes up for what earlier layers have done.
    """

    name: str
    summary: str
    settings: tuple[str, ...] = ()
    alone: Callable[[Settings], Rounding] | None = None
    with_data: Callable[[Settings], DataAware] | None = None
    follows_errors: bool = False

    @property
    def needs_data(self) -> bool:
        """Whether it has nothing to go by without the layer's inputs."""
        return self.alone is None


def _columns(name: str, summary: str, method: Method, *, follows_errors: bool = False) -> RoundingMethod:
    def aware(settings: Settings) -> DataAware:
        return DataAware(method, GptqOptions(**settings))

    return RoundingMethod(name, summary, COLUMN_SETTINGS, None, aware, follows_errors)


def _learned(name: str, summary: str) -> RoundingMethod:
    return RoundingMethod(
        name,
        summary,
        LEARNED_SETTINGS,
        lambda settings: Learned(rounding_options(name, settings)),
        lambda settings: DataAware("learned", learned=rounding_options(name, settings)),
    )


_ENTRIES = (
    RoundingMethod("none", "rounds to nearest", alone=lambda _: Nearest()),
    RoundingMethod("search", "looks for better scales", alone=lambda _: ScaleSearch()),
    _columns("gptq", "makes each column's error good in later ones", "gptq"),
    _columns("gptaq", "makes earlier layers' errors good too", "gptaq", follows_errors=True),
    _columns("quip", "is LDLQ, gptq for readers that know no rotation", "quip"),
    _learned("original", "learns the rounding by gradient descent with an adaptive rate"),
    _learned("adamw", "learns it with AdamW"),
    _learned("radam", "learns it with RAdam"),
    _learned("ppsf", "learns it with ProdigyPlus"),
)

_BY_NAME = {entry.name: entry for entry in _ENTRIES}
METHODS: Mapping[str, RoundingMethod] = MappingProxyType(_BY_NAME)
"""Every method by name, in the order a user should read them."""


def rounding_method(name: str) -> RoundingMethod:
    """Return the method called ``name``.

    Raises:
        ConfigurationError: there is none.
    """
    if name not in METHODS:
        raise ConfigurationError(
            f"no rounding method is named {name!r}",
            hint=did_you_mean(name, METHODS) or f"known: {', '.join(METHODS)}",
        )
    return METHODS[name]
