"""Write aside, verify, publish in one rename; and the manifest.

Everything a run writes lies in a hidden sibling of its final place
(``.qwodel-<token>/``), on the same file system, so that publishing is one
``rename(2)`` and a reader never sees half a model. What a killed process left
behind is the next run's, which :mod:`qwodel.leftovers` knows.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from qwodel.exceptions import QuantizationError, ResourceError, ValidationError
from qwodel.hashes import OutputHashes, manifest_beside
from qwodel.leftovers import LOCK, SCRATCH, finish, make_staging, remove_abandoned
from qwodel.report import json_text

__all__ = ["StagedOutput", "disk_errors", "require_space", "size_of"]

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
}
_LONGEST_SUFFIX = len(".replaced")


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
        self._hashes: OutputHashes | None = None
        self._publishing = False

    def __enter__(self) -> StagedOutput:
        folder = self.final.parent
        try:
            self._check_name()
            self._make_folder(folder)
            remove_abandoned(folder)
            self._refuse_existing()
            self._staging, self._lock = make_staging(folder)
        except OSError as error:
            self._clean()
            raise ValidationError(
                f"the output directory {folder} cannot be written: {error.strerror or error}",
                hint="choose another output_dir, or change its permissions",
            ) from error
        except QuantizationError:
            self._clean()
            raise
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
        return self._staging / SCRATCH

    @property
    def manifest_path(self) -> Path:
        """Where the manifest will be: inside a directory, beside a file."""
        if self.path.is_dir() or (not self.path.exists() and self.final.is_dir()):
            return self.final / "qwodel.manifest.json"
        return manifest_beside(self.final)

    @property
    def vanished(self) -> bool:
        """Whether somebody removed the place during the run."""
        return not self._staging.is_dir()

    def written(self) -> None:
        """Say that the artefact is there: it is hashed while it is being read back."""
        self._hashes = OutputHashes(self.path)

    def publish(self, manifest: Mapping[str, Any]) -> Path:
        """Sync the artefact and its manifest to disk and move them to their place.

        The manifest gets ``output`` (name and bytes) and ``outputs`` (bytes and SHA-256 of every file).

        Returns:
            The final path.

        Raises:
            ValidationError: something appeared there meanwhile.
            ResourceError: the disk is full.
        """
        self._refuse_existing()
        with disk_errors(f"publishing {self.final}"):
            outputs = self._synced_and_hashed()
            size = sum(each["bytes"] for each in outputs.values())
            about = {"output": {"name": self.final.name, "bytes": size}, "outputs": outputs}
            whole = self.path.is_dir()
            aside = (self.path if whole else self._staging) / self.manifest_path.name
            aside.write_text(json_text({**manifest, **about}) + "\n", "utf-8")
            _sync(aside)
            if whole:
                _sync(self.path, deep=False)
            else:
                # The artefact's own rename is what publishes; the manifest goes first. Were this the end,
                # the manifest's hashes would tell, and cleaning or the next run would take the second step.
                self._publishing = True
                aside.replace(self.manifest_path)
            _move(self.path, self.final)
            self._publishing = False
            _sync(self.final.parent, deep=False)
        self._created.clear()
        return self.final

    def _synced_and_hashed(self) -> dict[str, dict[str, Any]]:
        """Force the artefact to disk, with the rest of the hashing meanwhile."""
        if self._hashes is None:
            self.written()
        assert self._hashes is not None
        _sync(self.path)
        return self._hashes.result()

    def _check_name(self) -> None:
        """Refuse a name that the file system could not hold, or that is taken here, before any work."""
        if self.final.name in (LOCK, SCRATCH):
            raise ValidationError(f"an output cannot be called {self.final.name}", hint="choose another name")
        longest = max(len(os.fsencode(name)) for name in (self.final.name, manifest_beside(self.final).name))
        existing = next((each for each in self.final.parents if each.exists()), Path("/"))
        limit = 255
        with contextlib.suppress(OSError):
            limit = os.pathconf(existing, "PC_NAME_MAX")
        if longest + _LONGEST_SUFFIX > limit:
            raise ValidationError(
                f"the output's name has {longest} bytes, and names there have at most {limit - _LONGEST_SUFFIX}: "
                f"{self.final.name[:60]}…",
                hint="rename the model's file or folder: its name begins the output's",
            )

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
        if self._hashes is not None:
            self._hashes.stop()
        if self._publishing:
            with contextlib.suppress(OSError):
                finish(self._staging, self.final.parent)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if hasattr(self, "_staging"):
            shutil.rmtree(self._staging, ignore_errors=True)
        for folder in self._created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._created = []


def _move(source: Path, target: Path) -> None:
    """Rename ``source`` over ``target``; what a rename cannot replace is exchanged in one step, then removed."""
    directories = source.is_dir() or (target.is_dir() and not target.is_symlink())
    if not (directories and os.path.lexists(target)):
        source.replace(target)
        return
    if not _exchange(source, target):
        aside = source.with_name(f"{source.name}.replaced")
        target.rename(aside)
        source.rename(target)
        source = aside
    if source.is_dir() and not source.is_symlink():
        shutil.rmtree(source, ignore_errors=True)
    else:
        source.unlink(missing_ok=True)


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
