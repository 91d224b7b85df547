"""Write aside, verify, publish in one rename; and the manifest.

Everything a run writes lies in a hidden sibling of its final place
(``.qwodel-<token>/``), on the same file system, so that publishing is one
``rename(2)`` and a reader never sees half a model. The sibling holds a lock for
as long as its process lives: what a killed process left behind is recognised
by its free lock and removed by the next run into the same directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from qwodel.exceptions import ResourceError, ValidationError

__all__ = ["FileHashes", "StagedOutput", "disk_errors", "require_space", "size_of"]

_PREFIX = ".qwodel-"
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
}
_ABANDONED_SECONDS = 60.0


class StagedOutput:
    """A place to write one artefact (file or directory) that appears whole or not at all.

    Use as a context manager; write the artefact to :attr:`path` and intermediates
    to :attr:`scratch`, then call :meth:`publish`. Leaving the block removes
    whatever was not published.

    Args:
        final: where the artefact will be.
        overwrite: replace what is there already.

    Raises:
        ValidationError: ``final`` exists and ``overwrite`` is off, or its
            directory cannot be written.
    """

    def __init__(self, final: Path, *, overwrite: bool = False) -> None:
        self.final = final
        self.overwrite = overwrite
        self._created: list[Path] = []
        self._lock: int | None = None

    def __enter__(self) -> StagedOutput:
        self._refuse_existing()
        folder = self.final.parent
        try:
            self._make_folder(folder)
            _remove_abandoned(folder)
            self._staging = folder / f"{_PREFIX}{secrets.token_hex(6)}"
            self.scratch.mkdir(parents=True)
            self._lock = os.open(self._staging / "lock", os.O_CREAT | os.O_RDWR, 0o600)
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._clean()
            raise ValidationError(
                f"the output directory {folder} cannot be written: {error.strerror or error}",
                hint="choose another output_dir, or change its permissions",
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean()

    @property
    def path(self) -> Path:
        """Where to write the artefact."""
        return self._staging / self.final.name

    @property
    def scratch(self) -> Path:
        """A directory for intermediate files; removed whatever happens."""
        return self._staging / "scratch"

    @property
    def manifest_path(self) -> Path:
        """Where the manifest will be: inside a directory, beside a file."""
        if self.path.is_dir() or (not self.path.exists() and self.final.is_dir()):
            return self.final / "qwodel.manifest.json"
        return self.final.with_name(f"{self.final.stem}.manifest.json")

    def publish(self, manifest: Mapping[str, Any]) -> Path:
        """Sync the artefact and its manifest to disk and move them to their place.

        Returns:
            The final path.

        Raises:
            ValidationError: something appeared there meanwhile.
            ResourceError: the disk is full.
        """
        self._refuse_existing()
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        with disk_errors(f"publishing {self.final}"):
            if self.path.is_dir():
                (self.path / self.manifest_path.name).write_text(text, "utf-8")
            else:
                # The artefact's own rename is what publishes; the manifest goes first.
                aside = self._staging / self.manifest_path.name
                aside.write_text(text, "utf-8")
                _sync(aside)
            _sync(self.path)
            if not self.path.is_dir():
                aside.replace(self.manifest_path)
            _move(self.path, self.final)
            _sync(self.final.parent, deep=False)
        self._created.clear()
        return self.final

    def _refuse_existing(self) -> None:
        if self.final.exists() and not self.overwrite:
            raise ValidationError(
                f"{self.final} exists already",
                hint="pass overwrite=True (--overwrite) to replace it, or choose another output_dir",
            )

    def _make_folder(self, folder: Path) -> None:
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._created = missing

    def _clean(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if hasattr(self, "_staging"):
            shutil.rmtree(self._staging, ignore_errors=True)
        for folder in self._created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._created = []


def _remove_abandoned(folder: Path) -> None:
    """Remove staging directories whose processes are gone."""
    for staging in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            try:
                lock = os.open(staging / "lock", os.O_RDWR)
            except FileNotFoundError:
                # Another run may be between mkdir and lock.
                if time.time() - staging.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(staging, ignore_errors=True)
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(staging, ignore_errors=True)
            finally:
                os.close(lock)


def _move(source: Path, target: Path) -> None:
    """Rename ``source`` over ``target``; a directory in the way is exchanged in one step, then removed."""
    if not (target.is_dir() and not target.is_symlink()):
        source.replace(target)
        return
    if not _exchange(source, target):
        aside = source.with_name(f"{source.name}.replaced")
        target.rename(aside)
        source.rename(target)
        source = aside
    shutil.rmtree(source, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths atomically where the system can (Linux ``renameat2``)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(
        renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), ctypes.c_uint(rename_exchange))
        == 0
    )


def _sync(path: Path, *, deep: bool = True) -> None:
    if deep and path.is_dir():
        for child in path.iterdir():
            _sync(child)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn "no space left" and its kin into :class:`ResourceError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceError(
                f"{_FULL[error.errno]} while {doing}",
                hint="free some space, or choose an output_dir on a larger disk",
            ) from error
        raise


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise :class:`ResourceError` unless ``folder``'s file system has ``needed`` bytes free."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ResourceError(
            f"{purpose} needs about {needed / 1e9:.2f} GB on the disk of {folder}, which has {free / 1e9:.2f} GB free",
            hint="free some space, or choose an output_dir on a larger disk",
        )


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files under a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(child.stat().st_size for child in path.rglob("*") if child.is_file())


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
                digest = hashlib.sha256()
                with file.open("rb", buffering=0) as stream:
                    while not self._stop.is_set() and (chunk := stream.read(1 << 22)):
                        digest.update(chunk)
                self._hashes[file.name] = digest.hexdigest()
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
