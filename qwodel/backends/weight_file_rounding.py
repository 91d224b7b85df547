"""How the FP8 and INT8 backends choose codes: options turned into a rounding method."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from qwodel.algorithms.data_aware import DataAware
from qwodel.backends.weight_file_options import WeightFileOptions
from qwodel.checkpoint.rounding.methods import FromStatistics, FromStore, Rounding
from qwodel.checkpoint.rounding.registry import (
    COLUMN_SETTINGS,
    LEARNED_SETTINGS,
    METHODS,
    RoundingMethod,
    rounding_method,
)
from qwodel.checkpoint.rounding.statistics import StatisticsFile
from qwodel.exceptions import ConfigurationError

__all__ = ["data_aware", "rounding_of"]

log = logging.getLogger(__name__)

_WITH_DATA = "gptq"
"""What ``auto`` stands for where there are data; without them each format has its own."""


def rounding_of(options: WeightFileOptions) -> Rounding | None:
    """The rounding method that the options ask for; ``None`` leaves it to each format.

    Raises:
        ConfigurationError: options that contradict each other or would have no effect.
        CalibrationError: the statistics file is missing or holds none.
    """
    data = options.calibration_dataset is not None or options.calibration_data_path is not None
    method = _method(options, data)
    _check_data(options, method, data)
    _check_settings(options, method, data)
    if method is None:
        return None
    if data:
        if options.calibration_data_path is None:
            return FromStore(Path(), method.name)
        path = Path(options.calibration_data_path)
        StatisticsFile(path).close()
        return FromStatistics(path, data_aware(options), method.name)
    if method.alone is None:
        log.warning("%s has no calibration data to go by: scales are searched and codes rounded", method.name)
        return None
    return method.alone(_given(options, method.settings))


def data_aware(options: WeightFileOptions) -> DataAware:
    """The data-aware method and its settings."""
    method = _method(options, data=True)
    assert method is not None
    assert method.with_data is not None
    return method.with_data(_given(options, method.settings))


def _method(options: WeightFileOptions, data: bool) -> RoundingMethod | None:
    if options.optimizer != "auto":
        return rounding_method(options.optimizer)
    return METHODS[_WITH_DATA] if data else None


def _check_data(options: WeightFileOptions, method: RoundingMethod | None, data: bool) -> None:
    """Refuse data that the method makes no use of."""
    if options.calibration_dataset is not None and options.calibration_data_path is not None:
        raise ConfigurationError("give calibration_dataset or calibration_data_path, not both")
    if method is None:
        return
    if data and method.with_data is None:
        raise ConfigurationError(
            f"optimizer={method.name!r} makes no use of calibration data",
            hint="pass optimizer='gptq', or no data",
        )
    if method.follows_errors and options.calibration_data_path is not None:
        raise ConfigurationError(
            f"{method.name} follows the errors of quantized layers through the model, which statistics know nothing of",
            hint="pass calibration_dataset, or optimizer='gptq'",
        )


def _check_settings(options: WeightFileOptions, method: RoundingMethod | None, data: bool) -> None:
    """Refuse settings that would have no effect."""
    own = () if method is None else method.settings
    name = "auto" if method is None else method.name
    for settings, kind in ((LEARNED_SETTINGS, "learned rounding"), (COLUMN_SETTINGS, "gptq, gptaq and quip")):
        foreign = set(_given(options, settings)) - set(own)
        if data:
            foreign.discard("seed")  # of the choice of sequences, too
        if not foreign:
            continue
        takers = [repr(entry.name) for entry in METHODS.values() if settings == entry.settings]
        listed = ", ".join(each for each in settings if each in foreign)
        raise ConfigurationError(
            f"{listed} belong to {kind}, not to optimizer={name!r}",
            hint=f"pass optimizer={', '.join(takers[:-1])} or {takers[-1]}",
        )
    options.refuse_settings_without_text()


def _given(options: WeightFileOptions, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}
