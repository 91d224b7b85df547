"""float16 weights → 8-bit integers or palettes, by coremltools' passes.

k-means in one dimension has an exact solution by dynamic programming over the distinct values (Wang &
Song 2011), which coremltools' own ``kmeans1d`` finds in C, in tens of milliseconds a group; groups of
less than 10,000 values it gives to scikit-learn, one start of k-means++. Here the dynamic programming
runs over cells of values, in threads, and Lloyd's steps finish it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from qwodel.backends.coreml.formats import CoreMLRecipe
from qwodel.backends.coreml.mil.program import Program
from qwodel.backends.coreml.toolchain import (
    BarCallback,
    load_package,
    memory_errors,
    record_log,
    report_bars,
)
from qwodel.backends.coreml.weights import Weight
from qwodel.exceptions import ConversionError, QuantizationError

__all__ = ["compress", "divisor", "expected_seconds", "palettize"]

_SMALLEST_GROUP = 4  # fewer channels a palette cost more than they save
_SMALLEST_BLOCK = 8
_CELLS_PER_ENTRY = 32  # within 0.02 dB of the optimum on trained weights, at a tenth of its time
_LLOYD_STEPS = 100


def palettize(values: np.ndarray, bits: int, mode: str = "kmeans") -> tuple[np.ndarray, np.ndarray]:
    """Choose a palette for one group of weights.

    Args:
        values: any shape; taken as float16.
        bits: of a code.
        mode: ``kmeans``, least squared error; or ``uniform``, even steps from least to greatest.

    Returns:
        ``(palette, codes)``: float16 ``[2^bits]``, ascending, and uint8 of the shape of ``values``.
        Each code is that of the nearest entry.
    """
    patterns = np.ascontiguousarray(values, np.float16).view(np.uint16)
    counts = np.bincount(patterns.reshape(-1), minlength=1 << 16)
    present = np.flatnonzero(counts).astype(np.uint16)
    distinct = present.view(np.float16).astype(np.float64)
    order = np.argsort(distinct, kind="stable")
    present, distinct = present[order], distinct[order]
    size = 1 << bits
    if mode == "uniform":
        centres = np.linspace(distinct[0], distinct[-1], size)
    else:
        centres = _clusters(distinct, counts[present], min(size, len(distinct)))
    palette = np.sort(centres.astype(np.float16))
    palette = np.concatenate([palette, np.full(size - len(palette), palette[-1], np.float16)])
    wide = palette.astype(np.float64)
    table = np.zeros(1 << 16, np.uint8)
    table[present] = np.searchsorted((wide[1:] + wide[:-1]) / 2, distinct)
    return palette, table[patterns].reshape(values.shape)


def _clusters(distinct: np.ndarray, counts: np.ndarray, size: int) -> np.ndarray:
    """Centres of ``size`` clusters of weighted points in ascending order.

    Dynamic programming places them on cells of neighbouring points, where it is fast; Lloyd's steps over
    the points themselves then settle the borders.
    """
    from coremltools._deps import _kmeans1d

    weights = counts.astype(np.float64)
    starts = _cells(distinct, weights, size * _CELLS_PER_ENTRY)
    mass = np.add.reduceat(weights, starts)
    means = np.add.reduceat(weights * distinct, starts) / mass
    centres = np.array(_kmeans1d.cluster(means, size, weights=mass).centroids)
    total = np.concatenate([[0.0], np.cumsum(weights)])
    first = np.concatenate([[0.0], np.cumsum(weights * distinct)])
    previous = None
    for _ in range(_LLOYD_STEPS):
        inner = np.searchsorted(distinct, (centres[1:] + centres[:-1]) / 2)
        cuts = np.concatenate([[0], inner, [len(distinct)]])
        if previous is not None and np.array_equal(cuts, previous):
            break
        previous, members = cuts, np.diff(total[cuts])
        centres = np.where(members > 0, np.diff(first[cuts]) / np.maximum(members, 1), centres)
    return centres


def _cells(distinct: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """First points of about ``count`` cells: half of equal width, for the tails, half of equal mass."""
    if len(distinct) <= count:
        return np.arange(len(distinct))
    mass = np.cumsum(weights)
    widths = np.linspace(distinct[0], distinct[-1], count // 2 + 1)[1:-1]
    shares = np.linspace(0, mass[-1], count // 2 + 1)[1:-1]
    starts = np.unique(
        np.concatenate([[0], np.searchsorted(distinct, widths), np.searchsorted(mass, shares)])
    )
    return starts[starts < len(distinct)]


def divisor(total: int, wanted: int, least: int) -> int:
    """Return the largest divisor of ``total`` up to ``wanted``; 0 where it is less than ``least``."""
    found = next(size for size in range(min(wanted, total), 0, -1) if total % size == 0)
    return found if found >= least else 0


def expected_seconds(
    program: Program, weights: Sequence[Weight], recipe: CoreMLRecipe, workers: int
) -> float:
    """Estimate what choosing palettes will take, from one group of each shape of weight."""
    if recipe.kind != "palette":
        return 0.0
    shapes: dict[tuple[int, ...], list[Weight]] = {}
    for weight in weights:
        if weight.kept is None:
            shapes.setdefault(weight.shape, []).append(weight)
    total = 0.0
    for shape, same in shapes.items():
        size = divisor(shape[0], recipe.group_size, _SMALLEST_GROUP) if recipe.group_size else 0
        groups = shape[0] // size if size else 1
        sample = program.constant(same[0].name)[: shape[0] // groups]
        started = time.perf_counter()
        palettize(sample, recipe.bits, recipe.mode or "kmeans")
        each = time.perf_counter() - started
        total += each * groups * len(same) / min(workers, groups)
    return total


def compress(
    original: Program, weights: Sequence[Weight], recipe: CoreMLRecipe, workers: int, on_progress: BarCallback
) -> Any:
    """Return coremltools' model with the weights that are not kept compressed.

    Raises:
        ConversionError: coremltools fails; its error is chained.
        ResourceError: memory ran out.
    """
    model = load_package(original.package)  # imports coremltools quietly
    from coremltools.models.utils import _apply_graph_pass
    from coremltools.optimize.coreml import OptimizationConfig

    with record_log() as log, report_bars(on_progress), ThreadPoolExecutor(workers) as pool:
        config = OptimizationConfig()
        for weight in weights:
            if weight.kept is None:
                config.set_op_name(original.operation_name(weight.name), _op_config(recipe))
        try:
            with memory_errors("weights were compressed"):
                return _apply_graph_pass(model, _graph_pass(config, recipe, pool))
        except QuantizationError:
            raise
        except Exception as error:
            said = f" ({log[-1]})" if log else ""
            raise ConversionError(f"coremltools cannot compress the weights: {error}{said}") from error


def _op_config(recipe: CoreMLRecipe) -> Any:
    from coremltools.optimize.coreml import OpLinearQuantizerConfig, OpPalettizerConfig

    shared: dict[str, Any] = {"mode": recipe.mode, "granularity": recipe.granularity, "weight_threshold": 0}
    if recipe.kind == "linear":
        blocks = {"block_size": recipe.group_size} if recipe.group_size else {}
        return OpLinearQuantizerConfig(dtype="int8", **shared, **blocks)
    groups = {"group_size": recipe.group_size} if recipe.group_size else {}
    return OpPalettizerConfig(nbits=recipe.bits, **shared, **groups)


def _graph_pass(config: Any, recipe: CoreMLRecipe, pool: ThreadPoolExecutor) -> Any:
    """coremltools' compression pass, with groups that always divide and k-means in threads."""
    from coremltools.optimize.coreml import _quantization_passes as passes

    class LinearQuantizer(passes.linear_quantize_weights):  # type: ignore[misc]
        @classmethod
        def blockwise_compress_by_dtype(
            cls, original_data: np.ndarray, dtype: Any, mode: str, block_sizes: list[int]
        ) -> Any:
            fitting = [
                divisor(size, block, _SMALLEST_BLOCK) if block > 1 else block
                for size, block in zip(original_data.shape, block_sizes, strict=True)
            ]
            return super().blockwise_compress_by_dtype(original_data, dtype, mode, fitting)

    class Palettizer(passes.palettize_weights):  # type: ignore[misc]
        @staticmethod
        def blockwise_compress(data: np.ndarray, *given: Any, **_: Any) -> Any:
            block_sizes = given[2]  # after mode and bits, which the recipe has
            axis = next((axis for axis, block in enumerate(block_sizes) if block), 0)
            return _palettes(data, recipe, axis, block_sizes[axis], pool)

    return (LinearQuantizer if recipe.kind == "linear" else Palettizer)(config)


def _palettes(data: np.ndarray, recipe: CoreMLRecipe, axis: int, group: int, pool: ThreadPoolExecutor) -> Any:
    """Palettize ``data`` in groups of channels of one axis; coremltools' parameter tuple."""
    from coremltools.converters.mil.mil import types
    from coremltools.optimize._utils import LutParams

    channels = data.shape[axis]
    group = divisor(channels, group, _SMALLEST_GROUP) if group else 0
    groups = np.split(np.moveaxis(data, axis, 0), channels // group if group else 1)
    work = partial(palettize, bits=recipe.bits, mode=recipe.mode or "kmeans")
    results = list(pool.map(work, groups))
    lut = np.stack([palette for palette, _ in results]).astype(data.dtype)
    shape = [1] * (data.ndim + 2)
    shape[axis], shape[-2] = len(groups), lut.shape[1]
    codes = np.moveaxis(np.concatenate([codes for _, codes in results]), 0, axis)
    kind = types.nptype_from_builtin(types.string_to_builtin(f"uint{recipe.bits}"))
    return LutParams(np.ascontiguousarray(codes).astype(kind), lut.reshape(shape), None)
