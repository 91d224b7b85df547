"""A compression in this process, or in several through torchrun.

The processes read one request file. Rank 0 appends its progress to a file that the parent follows,
and leaves the outcome, or any rank an error, as JSON beside it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

import qwodel.exceptions
from qwodel.backends.awq.bridge import Report
from qwodel.backends.awq.compress import Compression, Outcome, compress
from qwodel.backends.awq.options import AWQOptions
from qwodel.children import child_environment, module_command
from qwodel.exceptions import ConversionError, QuantizationError
from qwodel.hardware import is_out_of_memory
from qwodel.process_state import AWQ_RUN

__all__ = ["main", "run_compression"]

_POLL_SECONDS = 0.3
_LAST_WORDS = 4000  # characters of the processes' output kept for an error


def run_compression(work: Compression, report: Report, scratch: Path) -> Outcome:
    """Run one compression with as many processes as its options ask for.

    Raises:
        QuantizationError: what :func:`~qwodel.backends.awq.compress.compress` raises.
        MemoryError: a process ran out of memory.
    """
    if work.options.nproc == 1:
        with AWQ_RUN:
            return compress(work, report)
    folder = scratch / "processes"
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    _write_request(work, folder)
    _supervise(work.options.nproc, folder, report)
    return _read_outcome(folder)


def main() -> None:
    """One rank: read the request, compress, leave the outcome."""
    folder = Path(sys.argv[1])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    try:
        _join_processes()
        with (folder / "events.jsonl").open("a", encoding="utf-8") as events:

            def report(done: float, total: float, message: str) -> None:
                if rank == 0:
                    events.write(json.dumps([done, total, message]) + "\n")
                    events.flush()

            outcome = compress(_read_request(folder), report, rank=rank, world=world)
        if rank == 0:
            _write_outcome(outcome, folder)
    except Exception as error:
        _write_error(error, folder, rank)
        raise


def _end_with(parent: int) -> None:
    """End this process once the one that asked is gone; torchrun gives its children no pipe to watch."""
    while True:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(1)


def _join_processes() -> None:
    import torch
    import torch.distributed as dist
    from compressed_tensors.distributed import init_dist

    if torch.accelerator.current_accelerator() is None:
        dist.init_process_group("gloo")
    else:
        init_dist()


def _supervise(nproc: int, folder: Path, report: Report) -> None:
    """Start torchrun, forward progress, and leave no process behind."""
    command = module_command(
        "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}",
        "-m", "qwodel.backends.awq.launch", str(folder), str(os.getpid()),
    )  # fmt: skip
    # torchrun starts the ranks with this environment, and without -P.
    environment = child_environment({"TOKENIZERS_PARALLELISM": "false"})
    environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // nproc, 1)))
    output = folder / "output.txt"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            report(0.0, 1.0, f"starting {nproc} processes")
            place, running = 0, True
            while running:
                # Asked before reading, so that the last words of a process that just ended are read too.
                running = process.poll() is None
                place = _forward(folder / "events.jsonl", place, report)
                if running:
                    time.sleep(_POLL_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    errors = sorted(folder.glob("error-*.json"))
    if errors:
        raise _read_error(errors[0])
    if process.returncode != 0 or not (folder / "outcome.json").is_file():
        words = output.read_text("utf-8", "replace")[-_LAST_WORDS:].strip()
        raise ConversionError(
            f"torchrun ended with status {process.returncode}: {(words.splitlines() or ['no output'])[-1]}"
        )


def _forward(file: Path, place: int, report: Report) -> int:
    """Report every whole line of ``file`` from byte ``place`` on; return where the next one starts."""
    if file.is_file():
        with file.open("rb") as stream:
            stream.seek(place)
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                place += len(line)
                report(*json.loads(line))
    return place


def _write_request(work: Compression, folder: Path) -> None:
    options = work.options.model_dump(mode="json", exclude={"calibration_dataset"})
    request = {
        "model": str(work.model), "architecture": work.architecture, "tokens": str(work.tokens),
        "target": str(work.target), "batch_size": work.batch_size, "options": options,
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request), "utf-8")


def _read_request(folder: Path) -> Compression:
    request: dict[str, Any] = json.loads((folder / "request.json").read_text("utf-8"))
    return Compression(
        Path(request["model"]),
        request["architecture"],
        Path(request["tokens"]),
        Path(request["target"]),
        request["batch_size"],
        AWQOptions(**request["options"]),
    )


def _write_outcome(outcome: Outcome, folder: Path) -> None:
    np.save(folder / "logits.npy", outcome.probe_logits.numpy())
    document = {
        "group_size": outcome.group_size,
        "symmetric": outcome.symmetric,
        "quantized": outcome.quantized,
        "untouched": outcome.untouched,
        "tokens_seen": outcome.tokens_seen,
    }
    aside = folder / "outcome.json.part"
    aside.write_text(json.dumps(document), "utf-8")
    aside.replace(folder / "outcome.json")


def _read_outcome(folder: Path) -> Outcome:
    import torch

    document = json.loads((folder / "outcome.json").read_text("utf-8"))
    return Outcome(**document, probe_logits=torch.from_numpy(np.load(folder / "logits.npy")))


def _write_error(error: Exception, folder: Path, rank: int) -> None:
    known = isinstance(error, QuantizationError)
    kind = "MemoryError" if is_out_of_memory(error) else type(error).__name__ if known else "ConversionError"
    document = {"kind": kind, "message": str(error) or kind, "hint": getattr(error, "hint", None)}
    aside = folder / f"error-{rank}.part"
    aside.write_text(json.dumps(document), "utf-8")
    aside.replace(folder / f"error-{rank}.json")


def _read_error(file: Path) -> Exception:
    document = json.loads(file.read_text("utf-8"))
    if document["kind"] == "MemoryError":
        return MemoryError(document["message"])
    kind: type[QuantizationError] = getattr(qwodel.exceptions, document["kind"])
    return kind(document["message"], hint=document["hint"])


if __name__ == "__main__":
    main()
