"""Do the pinned versions install everywhere? Resolves every extra, without installing, and prints one table.

Pythons of this machine are asked through pip's dry run, which takes the torch that this machine's
index gives; other systems through uv, which evaluates their markers and wheel tags (pip evaluates
markers for the running system only). Exit code 1 where anything does not resolve.

    python scripts/resolve.py                       # every extra, every Python and system
    python scripts/resolve.py --extra gguf --here   # one extra, Pythons of this machine only
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.11", "3.12", "3.13")
# The least macOS for which torch 2.13 has wheels; it has none for Intel Macs.
SYSTEMS = {
    "Linux x86-64": ("x86_64-manylinux_2_28", {}),
    "Linux arm64": ("aarch64-manylinux_2_28", {}),
    "macOS 14 arm64": ("aarch64-apple-darwin", {"MACOSX_DEPLOYMENT_TARGET": "14.0"}),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--extra", action="append", help="an extra; may be repeated; default: all of them")
    parser.add_argument("--here", action="store_true", help="only this machine's Pythons, through pip")
    parser.add_argument("--elsewhere", action="store_true", help="only other systems, through uv")
    options = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = options.extra or list(project["optional-dependencies"])
    failures = 0
    print("| resolver | Python | system | extras | result | seconds |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="qwodel-resolve-") as scratch:
        if not options.elsewhere:
            failures += sum(_here(Path(scratch), extras))
        if not options.here:
            failures += sum(_elsewhere(Path(scratch), extras))
    print(f"{failures} failed" if failures else "all resolve")
    return 1 if failures else 0


def _here(scratch: Path, extras: list[str]) -> Iterator[int]:
    for version in VERSIONS:
        python = _interpreter(version)
        if python is None:
            print(f"| pip | {version} | this machine | | no such Python here | |", flush=True)
            continue
        venv = scratch / f"venv{version}"
        subprocess.run([python, "-m", "venv", venv], check=True)
        pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        # Since 24.1 a dry run reads metadata alone where the index serves it.
        subprocess.run(
            [*pip, "install", "--quiet", "--upgrade", "pip>=24.1"], check=True, capture_output=True
        )
        for extra in extras:
            command = [*pip, "install", "--dry-run", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
            yield _report("pip", version, "this machine", extra, [*command, f"{ROOT}[{extra}]"], {})


def _interpreter(version: str) -> str | None:
    """Return a Python of that version: on the path, or among pyenv's."""
    candidates = [shutil.which(f"python{version}"), sys.executable]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates += [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python{version}"))]
    for candidate in filter(None, candidates):
        asked = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([candidate, "-c", asked], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return candidate
    return None


def _elsewhere(scratch: Path, extras: list[str]) -> Iterator[int]:
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if uv is None:
        sys.exit("other systems are resolved by uv: pip install uv")
    for system, (platform, environment) in SYSTEMS.items():
        for version in VERSIONS:
            for extra in extras:
                command = [uv, "pip", "compile", "--quiet", "--python-version", version]
                command += ["--python-platform", platform, "--constraint", str(ROOT / "constraints.txt")]
                command += [
                    "--extra",
                    extra,
                    "--output-file",
                    str(scratch / "resolved.txt"),
                    "pyproject.toml",
                ]
                yield _report("uv", version, system, extra, command, environment)


def _report(
    resolver: str, version: str, system: str, extra: str, command: list[str], environment: dict[str, str]
) -> int:
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - started
    result = "resolves" if done.returncode == 0 else "FAILS"
    print(f"| {resolver} | {version} | {system} | {extra} | {result} | {seconds:.0f} |", flush=True)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if "WARNING" not in line]
        print("\n".join(words[-12:]), file=sys.stderr, flush=True)
    return int(done.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
