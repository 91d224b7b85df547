"""What ``gptq_…``, ``quip_…`` and ``calibration_data_path`` of ``convert_to_int8`` mean for the engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwodel.algorithms.converter_options import rounding_options
from qwodel.algorithms.data_aware import DataAware
from qwodel.algorithms.gptq import GptqOptions
from qwodel.checkpoint.formats.codec import Codec
from qwodel.checkpoint.formats.quip import QUIP
from qwodel.checkpoint.formats.registry import storage_format
from qwodel.checkpoint.rounding.methods import FromStatistics, Rounding
from qwodel.checkpoint.rounding.statistics import StatisticsFile
from qwodel.exceptions import ConfigurationError
from qwodel.int8.gptq import block_solver

__all__ = ["COLUMNWISE", "columnwise_rounding", "learned_with_data", "quip_format"]

log = logging.getLogger(__name__)

COLUMNWISE = ("gptq", "quip")
"""Optimizers that round column by column."""

_SCHEMES = ("tensor", "block")


def columnwise_rounding(method: str, options: Mapping[str, Any]) -> Rounding | None:
    """How ``gptq`` or ``quip`` choose codes; ``None``, said in the log, where no statistics were given.

    Raises:
        CalibrationError: the statistics file is missing or holds none.
        DependencyError: ``gptq_turbo`` without Triton.
    """
    turbo = method == "gptq" and options["gptq_turbo"]
    block_solver(turbo)
    if options["calibration_data_path"] is None:
        log.warning("%s has no calibration data to go by: scales are searched and codes rounded", method)
        return None
    if method == "gptq":
        solver = GptqOptions(act_order=options["gptq_actorder"], lazy=options["gptq_fast"])
    else:
        solver = GptqOptions(
            act_order=options["quip_actorder"],
            segments=options["quip_checkpoint_segments"] if options["quip_checkpointed"] else 1,
            segment_from=options["quip_checkpoint_threshold"],
        )
    return FromStatistics(
        _statistics(options), DataAware("quip" if method == "quip" else "gptq", solver), method, turbo
    )


def learned_with_data(optimizer: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Rounding:
    """Learned rounding whose objective is the output error."""
    learned = DataAware("learned", learned=rounding_options(optimizer, settings))
    return FromStatistics(_statistics(options), learned, optimizer)


def quip_format(options: Mapping[str, Any], block_size: int | None) -> Codec:
    """What ``quip_store_transformed``, ``quip_requant_scheme`` and their like ask for.

    Raises:
        ConfigurationError: an unknown scheme, or options that contradict each other.
    """
    scheme, stored = options["quip_requant_scheme"], options["quip_store_transformed"]
    if scheme not in _SCHEMES:
        raise ConfigurationError(f"quip_requant_scheme is 'tensor' or 'block', not {scheme!r}")
    if stored:
        for name, neutral in (("quip_requant_scheme", "tensor"), ("quip_requant_tensor_per_row", True)):
            if options[name] != neutral:
                raise ConfigurationError(
                    f"{name} has no effect with quip_store_transformed: rows have a scale each"
                )
        if not options["quip_hadamard"]:
            return storage_format("int8_row")
        return replace(QUIP, seed=options["quip_seed"] or 0)
    for name, unset in (
        ("quip_hadamard", options["quip_hadamard"]),
        ("quip_seed", options["quip_seed"] is None),
    ):
        if not unset:
            raise ConfigurationError(
                f"{name} has an effect with quip_store_transformed only: codes for readers that know no "
                "rotation are solved for without one"
            )
    if scheme == "block":
        if not options["quip_requant_tensor_per_row"]:
            raise ConfigurationError(
                "quip_requant_tensor_per_row has no effect with quip_requant_scheme='block'"
            )
        return storage_format("int8_block", block_size)
    return storage_format("int8_row" if options["quip_requant_tensor_per_row"] else "int8_tensor")


def _statistics(options: Mapping[str, Any]) -> Path:
    path = Path(options["calibration_data_path"])
    StatisticsFile(path).close()
    return path
