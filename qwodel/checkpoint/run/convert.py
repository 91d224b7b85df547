"""Carrying out a plan: files made at their full size, tensors streamed into their places."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from qwodel.algorithms.data_aware import RoundingReport
from qwodel.checkpoint.files.writer import PlannedWriter, create_files
from qwodel.checkpoint.plan.plan import Plan
from qwodel.checkpoint.run.executor import Executor, SerialExecutor
from qwodel.checkpoint.run.tensor_work import WorkerFactory
from qwodel.exceptions import IntegrityError
from qwodel.progress import Progress
from qwodel.side_files import copy_side_files

__all__ = ["Conversion", "convert_checkpoint"]

_SYNC_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written.

    Attributes:
        plan: the plan that was carried out.
        destination: the file or directory.
        files: every weight file.
        reports: layer → how a data-aware method found its codes.
        squared_errors: weight name → ‖W−Ŵ‖² as the rounding method left it, where it was not plain rounding.
        fell_back: tensors that the CPU took over as the device's memory ran out.
    """

    plan: Plan
    destination: Path
    files: tuple[Path, ...]
    squared_errors: Mapping[str, float]
    reports: Mapping[str, RoundingReport]
    fell_back: tuple[str, ...] = ()


def convert_checkpoint(
    plan: Plan, destination: Path, *, executor: Executor | None = None, progress: Progress | None = None
) -> Conversion:
    """Write what ``plan`` describes.

    Peak memory follows a slab of rows, or the largest single weight for methods
    that need it whole; never the checkpoint.

    Args:
        plan: from :func:`~qwodel.checkpoint.plan.planning.build_plan`.
        destination: the file of a one-file layout, else the directory; a staging
            place, as nothing here is atomic.
        executor: where tensors are worked on; this process by default. The bytes
            do not depend on it.
        progress: gets bytes of source done, in its stage ``quantize``.

    Raises:
        ValidationError: a weight holds NaN or Inf.
        ConversionError: a rounding method or a worker process failed.
        ResourceError: the disk is full.
        Cancelled: the progress callback raised.
    """
    progress = progress or Progress(None)
    paths = plan.paths(destination)
    create_files(plan.files, paths)
    work = [each for each in plan.tensors if each.outputs]
    total = plan.source_bytes
    progress.stage("quantize", f"{len(work)} tensors")
    # Largest first: then no worker ends alone with the largest.
    work.sort(key=lambda each: -each.output_bytes)
    factory = WorkerFactory(plan.checkpoint.headers, plan.files, paths)
    done, errors, finished, fell_back = 0, {}, set(), []
    reports: dict[str, RoundingReport] = {}
    disk = _Disk(plan, paths)
    # An error's traceback would keep the generator, and its processes, alive.
    with closing((executor or SerialExecutor()).run(factory, work)) as results:
        for result in results:
            done += result.source_bytes
            finished.add(result.name)
            if result.fell_back:
                fell_back.append(result.name)
            if result.measured is not None:
                errors[result.name] = result.measured.squared_error
                if result.measured.report is not None:
                    reports[result.name.removesuffix(".weight")] = result.measured.report
            progress.update(done, total, result.name)
            disk.wrote(result.name)
    if missing := {each.name for each in work} - finished:
        raise IntegrityError(f"{len(missing)} tensors were not written: {min(missing)!r} …")
    _finish(plan, destination, paths)
    return Conversion(plan, destination, tuple(paths.values()), errors, reports, tuple(fell_back))


def _finish(plan: Plan, destination: Path, paths: Mapping[str, Path]) -> None:
    """Write constants, documents and side files, and force the weights to disk."""
    with PlannedWriter(plan.files, paths) as writer:
        for tensor in plan.constants:
            writer.write(tensor.name, tensor.payload or b"")
    for path in paths.values():
        _sync(path)
    for name, text in plan.documents.items():
        (destination / name).write_bytes(text)
    copy_side_files(plan.side_files, destination)


class _Disk:
    """Forces files to disk piece by piece while the next tensors are computed, so that little is left for the end."""

    def __init__(self, plan: Plan, paths: Mapping[str, Path]) -> None:
        self._sizes = {each.name: each.output_bytes for each in plan.tensors}
        places = {tensor: paths[file.name] for file in plan.files for tensor in file.offsets}
        self._files = {each.name: places[each.outputs[0].name] for each in plan.tensors if each.outputs}
        self._waiting: Counter[Path] = Counter()

    def wrote(self, name: str) -> None:
        """Note a finished tensor, and sync its file where enough has come together."""
        path = self._files[name]
        self._waiting[path] += self._sizes[name]
        if self._waiting[path] >= _SYNC_BYTES:
            _sync(path)
            del self._waiting[path]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
