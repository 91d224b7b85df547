"""How the FP8 and INT8 backends choose codes: options turned into a rounding method."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from qwodel.algorithms.converter_options import rounding_options
from qwodel.algorithms.data_aware import DataAware
from qwodel.algorithms.gptq import GptqOptions
from qwodel.backends.weight_file_options import WeightFileOptions
from qwodel.checkpoint.rounding.methods import (
    FromStatistics,
    FromStore,
    Learned,
    Nearest,
    Rounding,
    ScaleSearch,
)
from qwodel.checkpoint.rounding.statistics import StatisticsFile
from qwodel.exceptions import ConfigurationError

__all__ = ["data_aware", "rounding_of"]

log = logging.getLogger(__name__)

_LEARNED = ("num_iter", "lr", "lr_schedule", "top_p", "min_k", "max_k", "full_matrix", "seed")
_BY_COLUMN = ("gptq", "gptaq", "quip")
_COLUMNWISE = ("damping", "act_order")


def rounding_of(options: WeightFileOptions) -> Rounding | None:
    """The rounding method that the options ask for; ``None`` leaves it to each format.

    Raises:
        ConfigurationError: options that contradict each other or would have no effect.
        CalibrationError: the statistics file is missing or holds none.
    """
    method = options.optimizer
    data = options.calibration_dataset is not None or options.calibration_data_path is not None
    if method == "auto" and data:
        method = "gptq"
    _check_settings(options, method, data)
    if data:
        aware = data_aware(options)
        if options.calibration_data_path is not None:
            path = Path(options.calibration_data_path)
            StatisticsFile(path).close()
            return FromStatistics(path, aware, method)
        return FromStore(Path(), method)
    if method in _BY_COLUMN:
        log.warning("%s has no calibration data to go by: scales are searched and codes rounded", method)
        return None
    simple: dict[str, Rounding | None] = {"auto": None, "none": Nearest(), "search": ScaleSearch()}
    return (
        simple[method] if method in simple else Learned(rounding_options(method, _given(options, _LEARNED)))
    )


def _check_settings(options: WeightFileOptions, method: str, data: bool) -> None:
    """Refuse what would have no effect."""
    if options.calibration_dataset is not None and options.calibration_data_path is not None:
        raise ConfigurationError("give calibration_dataset or calibration_data_path, not both")
    if data and method in ("none", "search"):
        raise ConfigurationError(
            f"optimizer={method!r} makes no use of calibration data", hint="pass optimizer='gptq', or no data"
        )
    if method == "gptaq" and options.calibration_data_path is not None:
        raise ConfigurationError(
            "gptaq follows the errors of quantized layers through the model, which statistics know nothing of",
            hint="pass calibration_dataset, or optimizer='gptq'",
        )
    learned, columnwise = _given(options, _LEARNED), _given(options, _COLUMNWISE)
    if method not in ("original", "adamw", "radam", "ppsf"):
        learned.pop("seed", None) if data else None
        if learned:
            raise ConfigurationError(
                f"{', '.join(learned)} belong to learned rounding, and optimizer={method!r} does not learn",
                hint="pass optimizer='original', 'adamw', 'radam' or 'ppsf'",
            )
    if columnwise and method not in _BY_COLUMN:
        raise ConfigurationError(
            f"{', '.join(columnwise)} belong to gptq, gptaq and quip, not to optimizer={method!r}",
            hint="pass optimizer='gptq'",
        )
    options.refuse_settings_without_text()


def _given(options: WeightFileOptions, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def data_aware(options: WeightFileOptions) -> DataAware:
    """The data-aware method and its settings."""
    method = "gptq" if options.optimizer == "auto" else options.optimizer
    columnwise = GptqOptions(**_given(options, _COLUMNWISE))
    if method == "gptq" or method == "gptaq" or method == "quip":
        return DataAware(method, columnwise)
    return DataAware("learned", learned=rounding_options(method, _given(options, _LEARNED)))
