"""What a pip extra of qwodel installs, from the installed package's own metadata."""

from __future__ import annotations

import shlex
from importlib.metadata import PackageNotFoundError, requires

__all__ = ["install_command", "install_hint", "requirements_of"]


def requirements_of(extra: str) -> list[str]:
    """Return the requirements that ``qwodel[extra]`` adds on this machine, such as ``gguf<0.20,>=0.19``.

    Empty where qwodel is not installed as a package (a bare source tree), or has no such extra.
    """
    from packaging.requirements import Requirement

    try:
        listed = requires("qwodel") or []
    except PackageNotFoundError:
        return []
    found = []
    for line in listed:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or not marker.evaluate({"extra": extra}) or marker.evaluate({"extra": ""}):
            continue
        found.append(f"{requirement.name}{requirement.specifier}")
    return found


def install_command(extra: str) -> str:
    """Return the pip command that installs what ``qwodel[extra]`` stands for.

    It names the packages themselves, so that it does the same from a checkout, a wheel or an index.
    """
    packages = requirements_of(extra)
    if not packages:
        return f"pip install -e '.[{extra}]' in qwodel's source tree"
    return f"pip install {shlex.join(packages)}"


def install_hint(extra: str) -> str:
    """Return :func:`install_command` and what it stands for, as errors say it."""
    return f"{install_command(extra)}  (the packages of qwodel[{extra}])"
