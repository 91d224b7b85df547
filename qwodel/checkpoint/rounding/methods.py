"""The seam between the engine and the algorithms: how one weight becomes codes and scales.

A rounding is a frozen value, so that it can be printed, compared, kept in a
manifest and sent to a worker process. Data-aware methods hold the path of their
statistics, or of codes that were found while the model was run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch

from qwodel.algorithms.data_aware import DataAware, RoundingReport, round_together, searches_scale
from qwodel.algorithms.gptq import BlockSolver
from qwodel.algorithms.hadamard import Basis
from qwodel.algorithms.learned_rounding import RoundingOptions
from qwodel.algorithms.quant_types import TENSOR, Granularity, QuantType
from qwodel.algorithms.scales import Quantized, quantize_matrix, search_scale
from qwodel.algorithms.weight_rounding import round_weight
from qwodel.checkpoint.rounding.code_store import CodeStore
from qwodel.checkpoint.rounding.statistics import StatisticsFile

__all__ = [
    "FromStatistics",
    "FromStore",
    "LayerCodes",
    "LayerWeight",
    "Learned",
    "Nearest",
    "Rounding",
    "ScaleSearch",
    "default_rounding",
]


@dataclass(frozen=True, slots=True, eq=False)
class LayerCodes:
    """A layer's codes and, from methods that have more to say, how they were found."""

    codes: Quantized
    report: RoundingReport | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeight:
    """What a rounding method is given.

    Attributes:
        layer: the weight's name without ``.weight``.
        weight: finite ``[M, N]``, in the basis of its codes.
        quant_type, granularity: what it becomes.
        basis: that basis; ``None`` for the weight's own.
    """

    layer: str
    weight: torch.Tensor
    quant_type: QuantType
    granularity: Granularity
    basis: Basis | None = None

    def nearest(self, scale: torch.Tensor | None = None) -> LayerCodes:
        """The nearest codes, by ``scale`` or the absolute maximum."""
        return LayerCodes(quantize_matrix(self.weight, self.quant_type, self.granularity, scale))


class Rounding:
    """A rounding method, and what the engine asks of it; a frozen value of a subclass.

    The answers here are those of a method that takes a weight whole and has nothing to go by but the weight.
    """

    __slots__ = ()

    name: str
    """The method's name in plans and manifests."""

    def rows_apart(self, granularity: Granularity) -> bool:
        """Whether rows may be rounded in separate pieces that do not cut a block, with the same result."""
        del granularity
        return False

    def needs(self, shape: tuple[int, ...]) -> Mapping[str, int]:
        """Sizes that grow with a weight it takes whole, by the names of streaming thresholds."""
        return {"hadamard": math.prod(shape)}

    @property
    def is_nearest(self) -> bool:
        """Whether codes are the nearest by absmax scales, which are the same however rows are cut."""
        return False

    @property
    def uses_data(self) -> bool:
        """Whether it goes by how the model's inputs are."""
        return False

    @property
    def waits_for_codes(self) -> bool:
        """Whether its codes are found while the model is run, before the checkpoint is written."""
        return False

    def with_codes_in(self, folder: Path) -> Rounding:
        """This method, once the codes it waits for are in ``folder``."""
        del folder
        return self

    def round(self, given: LayerWeight) -> LayerCodes:
        """Quantize a layer's weight, all of it or, where rows are apart, some of its rows."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Nearest(Rounding):
    """Absmax scales, round to nearest. Works in pieces of rows for every granularity."""

    name: str = field(default="nearest", init=False)

    @property
    def is_nearest(self) -> bool:
        """Always."""
        return True

    def rows_apart(self, granularity: Granularity) -> bool:
        """Always."""
        del granularity
        return True

    def round(self, given: LayerWeight) -> LayerCodes:
        """The nearest codes by absmax scales."""
        return given.nearest()


@dataclass(frozen=True, slots=True)
class ScaleSearch(Rounding):
    """Scales searched for the least squared weight error, round to nearest."""

    name: str = field(default="search", init=False)

    def rows_apart(self, granularity: Granularity) -> bool:
        """Where rows have scales of their own: one scale for all takes all rows."""
        return granularity != TENSOR

    def round(self, given: LayerWeight) -> LayerCodes:
        """The nearest codes by the scale of least squared error."""
        return given.nearest(search_scale(given.weight, given.quant_type, given.granularity))


@dataclass(frozen=True, slots=True)
class Learned(Rounding):
    """Codes learned from the nearest ones on; needs the whole weight.

    Attributes:
        options: the solver's settings.
    """

    options: RoundingOptions = field(default_factory=RoundingOptions)
    name: str = field(default="learned", init=False)

    def round(self, given: LayerWeight) -> LayerCodes:
        """Codes learned under the weight's own strongest directions."""
        learned = round_weight(given.weight, given.quant_type, given.granularity, self.options)
        return LayerCodes(learned.quantized)


@dataclass(frozen=True, slots=True)
class FromStatistics(Rounding):
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

    @property
    def uses_data(self) -> bool:
        """Always."""
        return True

    def needs(self, shape: tuple[int, ...]) -> Mapping[str, int]:
        """The whole weight, and matrices of its N inputs."""
        return {"hadamard": math.prod(shape), "hessian": shape[1], "ldlq": shape[1]}

    def round(self, given: LayerWeight) -> LayerCodes:
        """Codes of least error under the layer's statistics, turned into the codes' basis."""
        file = self.path.stat()
        statistics = _statistics(self.path, file.st_mtime_ns, file.st_size).read(given.layer)
        if statistics is not None and statistics.gram is not None:
            gram = statistics.gram.to(given.weight.device)
            statistics = replace(statistics, gram=gram if given.basis is None else given.basis.gram(gram))
        solver: BlockSolver | None = None
        if self.turbo:
            from qwodel.algorithms.gptq_triton import solve_block_triton

            solver = solve_block_triton
        done = round_together(
            [given.weight], given.quant_type, given.granularity, statistics, self.options, solver=solver
        )[0]
        return LayerCodes(done.codes, done.report)


@dataclass(frozen=True, slots=True)
class FromStore(Rounding):
    """Codes that were found while the model was run block by block.

    Attributes:
        folder: where they are.
        name: the name of the method that found them.
    """

    folder: Path
    name: str

    @property
    def uses_data(self) -> bool:
        """Always."""
        return True

    @property
    def waits_for_codes(self) -> bool:
        """Always."""
        return True

    def with_codes_in(self, folder: Path) -> Rounding:
        """The same method, reading ``folder``."""
        return replace(self, folder=folder)

    def round(self, given: LayerWeight) -> LayerCodes:
        """The codes found for the layer; the weight is not looked at."""
        return LayerCodes(_store(self.folder).get(given.layer))


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
