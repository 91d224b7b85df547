"""SHA-256 of files: of sources while work goes on, of outputs for their manifest; and files that must not change."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from qwodel.exceptions import IntegrityError

__all__ = [
    "FileHashes",
    "FileState",
    "SourceFiles",
    "check_outputs",
    "describes",
    "hash_outputs",
    "manifest_beside",
]

_CHUNK = 1 << 22
_MANIFEST_BYTES = 1 << 28


class FileState(NamedTuple):
    """What tells that a file was written to or replaced: device, inode, size, time of modification.

    The change time is left out: hard links and permissions change it, and no byte.
    """

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Return the state of the file that ``path``, or the link there, leads to.

        Raises:
            OSError: there is none.
        """
        stat = path.stat()
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


class FileHashes:
    """SHA-256 of files, computed in a thread while other work goes on."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = list(files)
        self._stop = threading.Event()
        self._hashes: dict[str, str] = {}
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="qwodel-hashes", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for file in self._files:
                self._hashes[file.name] = _sha256(file, self._stop)
        except OSError as error:
            self._error = error

    def result(self) -> dict[str, str]:
        """Wait, and return file name → hexadecimal digest."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._hashes

    def stop(self) -> None:
        """Give up early."""
        self._stop.set()
        self._thread.join()


class SourceFiles:
    """The files a run reads: hashed meanwhile, and the same at its end as at its start.

    Use as a context manager around the run.

    Args:
        weights: files whose hashes the manifest has.
        beside: configuration and side files, which are read or copied.
    """

    def __init__(self, weights: Iterable[Path], beside: Iterable[Path] = ()) -> None:
        self.weights = tuple(weights)
        # Their states come first: a file that changes while it is hashed differs from its state at the end.
        self._states = {path: FileState.of(path) for path in (*self.weights, *beside)}
        self.hashes = FileHashes(self.weights)

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hashes.stop()

    def settled(self) -> dict[str, str]:
        """Wait for the hashes of the weight files, and return them by name.

        Raises:
            IntegrityError: a file is not what it was when the run began.
        """
        self.check()
        found = self.hashes.result()
        self.check()
        return found

    def check(self) -> None:
        """Raise IntegrityError where a file is not what it was when the run began."""
        for path, before in self._states.items():
            try:
                now: FileState | None = FileState.of(path)
            except OSError:
                now = None
            if now != before:
                what = "disappeared" if now is None else "changed"
                raise IntegrityError(
                    f"{path} {what} while it was being quantized, so nothing was published",
                    hint="run again when nothing writes to the model's folder any more",
                )


def hash_outputs(path: Path) -> dict[str, dict[str, Any]]:
    """Return ``{relative name: {"bytes", "sha256"}}`` of a file, or of all files in a directory.

    Files are hashed in parallel; :mod:`hashlib` lets go of the interpreter meanwhile.
    """
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    names = [each.relative_to(path).as_posix() if each != path else path.name for each in files]
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1) or 1) as pool:
        digests = pool.map(_sha256, files)
        return {
            name: {"bytes": file.stat().st_size, "sha256": digest}
            for name, file, digest in zip(names, files, digests, strict=True)
        }


def manifest_beside(path: Path) -> Path:
    """Where the manifest of the single file ``path`` is."""
    return path.with_name(f"{path.stem}.manifest.json")


def describes(manifest: Path, file: Path) -> bool:
    """Whether a manifest's hash of a single published file is that of ``file``."""
    try:
        if manifest.stat().st_size > _MANIFEST_BYTES:
            return False
        outputs = json.loads(manifest.read_bytes())["outputs"]
        size, digest = outputs[file.name]["bytes"], outputs[file.name]["sha256"]
        return bool(file.stat().st_size == size and _sha256(file) == digest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _sha256(file: Path, stop: threading.Event | None = None) -> str:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while not (stop and stop.is_set()) and (chunk := stream.read(_CHUNK)):
            digest.update(chunk)
    return digest.hexdigest()


def check_outputs(path: Path, outputs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what is not as a manifest's ``outputs`` say, in sentences: missing, of another size, other bytes."""
    problems = []
    for name, stated in outputs.items():
        file = path if path.is_file() else path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != stated["bytes"]:
            problems.append(
                f"{name} has {file.stat().st_size:,} bytes, the manifest says {stated['bytes']:,}"
            )
        elif _sha256(file) != stated["sha256"]:
            problems.append(f"{name} has other bytes than the manifest says")
    return problems
