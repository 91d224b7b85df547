"""The seam between the engine and the algorithms: how one weight becomes codes and scales.

A rounding is a frozen value, so that it can be printed, compared, kept in a
manifest and sent to a worker process. Data-aware methods hold the path of their
statistics, or of codes that were found while the model was run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch

from qwodel.algorithms.data_aware import DataAware, RoundingReport, round_together, searches_scale
from qwodel.algorithms.gptq import BlockSolver
from qwodel.algorithms.hadamard import Basis
from qwodel.algorithms.learned_rounding import RoundingOptions
from qwodel.algorithms.quant_types import TENSOR, Granularity, QuantType
from qwodel.algorithms.scales import Quantized, quantize, search_scale
from qwodel.algorithms.weight_rounding import round_weight
from qwodel.checkpoint.code_store import CodeStore
from qwodel.checkpoint.statistics import StatisticsFile

__all__ = [
    "FromStatistics",
    "FromStore",
    "Learned",
    "Nearest",
    "Rounded",
    "Rounding",
    "ScaleSearch",
    "default_rounding",
]


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """A layer's codes and, from methods that have more to say, how they were found."""

    codes: Quantized
    report: RoundingReport | None = None


class Rounding(Protocol):
    """What the engine asks of a rounding method."""

    @property
    def name(self) -> str:
        """The method's name in plans and manifests."""

    def rows_apart(self, granularity: Granularity) -> bool:
        """Whether rows may be rounded in separate pieces that do not cut a block, with the same result."""

    def round(
        self,
        weight: torch.Tensor,
        quant_type: QuantType,
        granularity: Granularity,
        *,
        layer: str,
        basis: Basis | None = None,
    ) -> Rounded:
        """Quantize the finite ``[M, N]`` weight of ``layer`` (its name without ``.weight``).

        Args:
            basis: the weight comes in this basis.
        """


@dataclass(frozen=True, slots=True)
class Nearest:
    """Absmax scales, round to nearest. Works in pieces of rows for every granularity."""

    name: str = field(default="nearest", init=False)

    def rows_apart(self, granularity: Granularity) -> bool:
        return granularity != TENSOR

    def round(
        self,
        weight: torch.Tensor,
        quant_type: QuantType,
        granularity: Granularity,
        *,
        layer: str,
        basis: Basis | None = None,
    ) -> Rounded:
        del layer, basis
        return Rounded(quantize(weight, quant_type, granularity))


@dataclass(frozen=True, slots=True)
class ScaleSearch:
    """Scales searched for the least squared weight error, round to nearest."""

    name: str = field(default="search", init=False)

    def rows_apart(self, granularity: Granularity) -> bool:
        return granularity != TENSOR

    def round(
        self,
        weight: torch.Tensor,
        quant_type: QuantType,
        granularity: Granularity,
        *,
        layer: str,
        basis: Basis | None = None,
    ) -> Rounded:
        del layer, basis
        scale = search_scale(weight, quant_type, granularity)
        return Rounded(quantize(weight, quant_type, granularity, scale))


@dataclass(frozen=True, slots=True)
class Learned:
    """Codes learned from the nearest ones on; needs the whole weight.

    Attributes:
        options: the solver's settings.
    """

    options: RoundingOptions = field(default_factory=RoundingOptions)
    name: str = field(default="learned", init=False)

    def rows_apart(self, granularity: Granularity) -> bool:
        del granularity
        return False

    def round(
        self,
        weight: torch.Tensor,
        quant_type: QuantType,
        granularity: Granularity,
        *,
        layer: str,
        basis: Basis | None = None,
    ) -> Rounded:
        del layer, basis
        return Rounded(round_weight(weight, quant_type, granularity, self.options).quantized)


@dataclass(frozen=True, slots=True)
class FromStatistics:
    """Codes of least output error, by statistics that were collected before.

    Attributes:
        path: the statistics file.
        options: the method and its settings.
        name: the method's name in plans and manifests.
        turbo: run GPTQ's inner loop as a Triton kernel.
    """

    path: Path
    options: DataAware
    name: str
    turbo: bool = False

    def rows_apart(self, granularity: Granularity) -> bool:
        del granularity
        return False

    def round(
        self,
        weight: torch.Tensor,
        quant_type: QuantType,
        granularity: Granularity,
        *,
        layer: str,
        basis: Basis | None = None,
    ) -> Rounded:
        file = self.path.stat()
        statistics = _statistics(self.path, file.st_mtime_ns, file.st_size).read(layer)
        if statistics is not None and statistics.gram is not None:
            gram = statistics.gram.to(weight.device)
            statistics = replace(statistics, gram=gram if basis is None else basis.gram(gram))
        solver: BlockSolver | None = None
        if self.turbo:
            from qwodel.algorithms.gptq_triton import solve_block_triton

            solver = solve_block_triton
        done = round_together([weight], quant_type, granularity, statistics, self.options, solver=solver)[0]
        return Rounded(done.codes, done.report)


@dataclass(frozen=True, slots=True)
class FromStore:
    """Codes that were found while the model was run block by block.

    Attributes:
        folder: where they are.
        name: the name of the method that found them.
    """

    folder: Path
    name: str

    def rows_apart(self, granularity: Granularity) -> bool:
        del granularity
        return False

    def round(
        self,
        weight: torch.Tensor,
        quant_type: QuantType,
        granularity: Granularity,
        *,
        layer: str,
        basis: Basis | None = None,
    ) -> Rounded:
        del weight, quant_type, granularity, basis
        return Rounded(_store(self.folder).get(layer))


@lru_cache(maxsize=4)
def _statistics(path: Path, _changed: int, _size: int) -> StatisticsFile:
    return StatisticsFile(path)


@lru_cache(maxsize=4)
def _store(folder: Path) -> CodeStore:
    return CodeStore(folder)


def default_rounding(quant_type: QuantType | None, granularity: Granularity) -> Rounding:
    """Return what serves best without calibration data and at little cost.

    FP8 scales of rows and blocks gain from a search; a smaller INT8 or
    whole-tensor scale lowers the weights' error but clips the outliers that
    outputs depend on, so those stay at the absolute maximum.
    """
    searched = quant_type is not None and searches_scale(quant_type, granularity)
    return ScaleSearch() if searched else Nearest()
