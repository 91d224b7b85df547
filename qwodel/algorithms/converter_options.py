"""Keyword arguments of the converters, checked by name and turned into rounding options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from qwodel.algorithms.learned_rounding import RoundingOptions
from qwodel.algorithms.schedules import ScheduleOptions
from qwodel.exceptions import ConfigurationError, did_you_mean

__all__ = ["rounding_options"]

_SCHEDULE = tuple(f.name for f in fields(ScheduleOptions))
_ROUNDING = tuple(f.name for f in fields(RoundingOptions) if f.name != "schedule")


def rounding_options(optimizer: str, settings: Mapping[str, Any]) -> RoundingOptions:
    """Options from flat keywords: those of :class:`RoundingOptions` and :class:`ScheduleOptions`.

    ProdigyPlus (``ppsf``) finds its own rate, so unless told otherwise its schedule only
    shrinks, and slowly.

    Raises:
        ConfigurationError: a keyword is unknown or has a bad value.
        DependencyError: the optimizer's package is missing.
    """
    known = (*_SCHEDULE, *_ROUNDING)
    for name in settings:
        if name not in known:
            raise ConfigurationError(
                f"learned rounding has no option {name!r}", hint=did_you_mean(name, known)
            )
    schedule = {name: value for name, value in settings.items() if name in _SCHEDULE}
    if optimizer == "ppsf":
        schedule = {"lr_factor": 0.95} | schedule
    rounding = {name: value for name, value in settings.items() if name in _ROUNDING}
    return RoundingOptions(**rounding | {"optimizer": optimizer}, schedule=ScheduleOptions(**schedule))
