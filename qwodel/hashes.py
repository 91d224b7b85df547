"""SHA-256 of files: of sources while work goes on, of outputs for their manifest; and files that must not change."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from qwodel.exceptions import IntegrityError, ValidationError
from qwodel.exhaustion import exhaustion

__all__ = [
    "FileHashes",
    "FileState",
    "OutputHashes",
    "SourceFiles",
    "check_outputs",
    "describes",
    "hash_outputs",
    "manifest_beside",
    "stated_outputs",
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
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="qwodel-hashes", daemon=True)
        with exhaustion("starting a thread that hashes files"):
            self._thread.start()

    def _run(self) -> None:
        try:
            with exhaustion("hashing files"):
                for file in self._files:
                    self._hashes[file.name] = _sha256(file, self._stop)
        except BaseException as error:
            # A thread's own end would leave the hashes incomplete, and nobody would hear of it.
            self._error = error

    def result(self) -> dict[str, str]:
        """Wait, and return file name → hexadecimal digest; raise what the thread failed with."""
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

    Raises:
        ValidationError: one of them is not there.
    """

    def __init__(self, weights: Iterable[Path], beside: Iterable[Path] = ()) -> None:
        self.weights = tuple(weights)
        # Their states come first: a file that changes while it is hashed differs from its state at the end.
        self._states = {path: _state(path) for path in (*self.weights, *beside)}
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


def _state(path: Path) -> FileState:
    try:
        return FileState.of(path)
    except OSError as error:
        raise ValidationError(f"{path} cannot be read: {error.strerror or error}") from error


class OutputHashes:
    """Hashes of what has been written, begun while it is still being read back.

    A file that changes after it was hashed is hashed again in the end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[Path, tuple[FileState, str]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="qwodel-output-hashes", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with suppress(OSError):  # what is not hashed here is hashed in the end
            for file in _files(self._path):
                state, digest = FileState.of(file), _sha256(file, self._stop)
                if self._stop.is_set():
                    return
                self._known[file] = state, digest

    def result(self) -> dict[str, dict[str, Any]]:
        """Wait, and return what :func:`hash_outputs` does."""
        self._thread.join()
        return hash_outputs(self._path, self._known)

    def stop(self) -> None:
        """Give up early."""
        self._stop.set()
        self._thread.join()


def hash_outputs(
    path: Path, known: Mapping[Path, tuple[FileState, str]] | None = None
) -> dict[str, dict[str, Any]]:
    """Return ``{relative name: {"bytes", "sha256"}}`` of a file, or of all files in a directory.

    Files are hashed in parallel; :mod:`hashlib` lets go of the interpreter meanwhile.

    Args:
        path: the file or directory.
        known: files with the hash they had in some state; it counts where the state is the same.
    """

    def digest(file: Path) -> str:
        state, found = (known or {}).get(file, (None, ""))
        return found if state == FileState.of(file) else _sha256(file)

    files = _files(path)
    names = [each.relative_to(path).as_posix() if each != path else path.name for each in files]
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1) or 1) as pool:
        return {
            name: {"bytes": file.stat().st_size, "sha256": found}
            for name, file, found in zip(names, files, pool.map(digest, files), strict=True)
        }


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())


def manifest_beside(path: Path) -> Path:
    """Where the manifest of the single file ``path`` is."""
    return path.with_name(f"{path.stem}.manifest.json")


def stated_outputs(path: Path) -> tuple[Path, Mapping[str, Mapping[str, Any]]] | None:
    """Return the manifest of a published file or directory, and what it says of its files; ``None`` without one.

    Raises:
        IntegrityError: what is there is no manifest.
    """
    manifest = path / "qwodel.manifest.json" if path.is_dir() else manifest_beside(path)
    if not manifest.is_file() or manifest == path:
        return None
    try:
        document = json.loads(manifest.read_bytes()) if manifest.stat().st_size <= _MANIFEST_BYTES else None
        if isinstance(document, dict) and "outputs" not in document:
            return None  # of a release that did not state them
        outputs = document["outputs"]  # type: ignore[index]
        stated = {
            str(name): {"bytes": int(each["bytes"]), "sha256": str(each["sha256"])}
            for name, each in outputs.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{manifest} is no manifest that can be read: {error!r}") from error
    inside = (path.parent if path.is_file() else path).resolve()
    if any(not (inside / name).resolve().is_relative_to(inside) for name in stated):
        raise IntegrityError(f"{manifest} names files outside of its folder")
    return manifest, stated


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


def check_outputs(
    path: Path, outputs: Mapping[str, Mapping[str, Any]], *, sizes_only: bool = False
) -> list[str]:
    """Return what is not as a manifest's ``outputs`` say, in sentences: missing, of another size, other bytes."""
    problems = []
    for name, stated in outputs.items():
        file = path.parent / name if path.is_file() else path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != stated["bytes"]:
            problems.append(
                f"{name} has {file.stat().st_size:,} bytes, the manifest says {stated['bytes']:,}"
            )
        elif not sizes_only and _sha256(file) != stated["sha256"]:
            problems.append(f"{name} has other bytes than the manifest says")
    return problems
