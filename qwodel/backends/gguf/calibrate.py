"""The importance matrix of a run: loaded from a file, or computed from text and kept for the next run."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwodel.backends.base import Job
from qwodel.backends.gguf.imatrix import ImportanceMatrix, read_imatrix
from qwodel.backends.gguf.native import NativeFailure, run_worker
from qwodel.backends.gguf.options import GGUFOptions
from qwodel.backends.gguf.steps import Heartbeat
from qwodel.calibration import describe_dataset, load_texts
from qwodel.exceptions import CalibrationError
from qwodel.gguf_header import GGUFHeader
from qwodel.hardware import cpu_count

__all__ = ["MatrixFile", "importance_matrix"]

_BYTES_PER_TOKEN = 16  # more than any tokenizer averages on prose
_log = logging.getLogger("GGUFQuantizer")


@dataclass(frozen=True)
class MatrixFile:
    """An importance matrix on disk."""

    path: Path
    matrix: ImportanceMatrix

    def report(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        return {
            "file": self.path.name,
            "datasets": list(self.matrix.datasets),
            "chunks": self.matrix.chunk_count,
            "chunk_size": self.matrix.chunk_size,
            "entries": len(self.matrix.entries),
            "partial": {name: round(share, 4) for name, share in self.matrix.partial().items()},
        }


def importance_matrix(job: Job[GGUFOptions], model: Path, headers: list[GGUFHeader]) -> MatrixFile | None:
    """Return the matrix this run uses, computing it where calibration text was given.

    Raises:
        CalibrationError: it is unreadable, was made for another model, or there is too little text.
    """
    if job.options.imatrix is not None:
        path = job.options.imatrix
    elif job.options.calibration_dataset is not None:
        path = _compute(job, model)
    else:
        return None
    matrix = read_imatrix(path)
    _check_fits(matrix, path, headers)
    for name, share in matrix.partial().items():
        _log.warning(
            "%s: only %.0f %% of the experts saw data; the others count every channel alike",
            name,
            100 * share,
        )
    return MatrixFile(path, matrix)


def _check_fits(matrix: ImportanceMatrix, path: Path, headers: list[GGUFHeader]) -> None:
    shapes = {tensor.name: tensor.shape for header in headers for tensor in header.tensors.values()}
    matching = 0
    for name, entry in matrix.entries.items():
        if name not in shapes:
            continue
        matching += 1
        experts = shapes[name][0] if len(shapes[name]) == 3 else 1
        if entry.sums.size != shapes[name][-1] * experts:
            raise CalibrationError(
                f"{path.name} was made for another model: {name} has {shapes[name][-1] * experts} input channels, "
                f"and the matrix {entry.sums.size}"
            )
    if matching == 0:
        raise CalibrationError(
            f"{path.name} was made for another model: it names none of this model's tensors"
        )


def _compute(job: Job[GGUFOptions], model: Path) -> Path:
    """Compute the matrix, or reuse the one an earlier run with the same inputs left beside the output."""
    options = job.options
    assert options.calibration_dataset is not None
    name = describe_dataset(options.calibration_dataset)
    job.progress.stage("calibrate", f"reading {name}")
    text = job.output.scratch / "calibration.txt"
    digest = _write_text(job, text)
    for value in (options.seq_length, options.num_samples, *sorted(job.files.hashes.result().values())):
        digest.update(f"\n{value}".encode())
    kept = job.output.final.with_name(f"{job.source.name}.imatrix-{digest.hexdigest()[:12]}.gguf")
    if kept.is_file():
        _log.info("using the importance matrix %s", kept.name)
        return kept
    target = job.output.scratch / kept.name
    heart = Heartbeat(job.progress)

    def on_event(event: dict[str, Any]) -> None:
        if "chunk" in event:
            done, total = event["chunk"], event["chunks"]
            heart.update(done, total, f"importance matrix: sample {min(done + 1, total)} of {total}")

    request = {
        "model": str(model),
        "text": str(text),
        "target": str(target),
        "dataset": name,
        "seq_length": options.seq_length,
        "num_samples": options.num_samples,
        "nthread": options.nthread or cpu_count(),
    }
    try:
        run_worker("imatrix", request, on_event=on_event, on_heartbeat=heart.beat)
    except NativeFailure as failure:
        raise CalibrationError(
            f"no importance matrix from {name}: {failure}",
            hint="give more or other text, or a shorter seq_length",
        ) from failure
    job.files.check()  # the name it is kept under holds the hashes of the source
    # Hours of work on a large model: kept whatever becomes of this run.
    target.replace(kept)
    return kept


def _write_text(job: Job[GGUFOptions], target: Path) -> Any:
    """Write as much text as the samples can take, and return its running SHA-256."""
    options = job.options
    assert options.calibration_dataset is not None
    digest, budget = hashlib.sha256(), options.num_samples * options.seq_length * _BYTES_PER_TOKEN
    with target.open("wb") as file:
        for text in load_texts(
            options.calibration_dataset, split=options.calibration_split, token=options.token
        ):
            data = text.encode("utf-8", "replace")[:budget] + b"\n"
            file.write(data)
            digest.update(data)
            budget -= len(data)
            if budget <= 0:
                break
    return digest
