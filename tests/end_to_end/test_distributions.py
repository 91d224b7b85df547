"""The wheel and the source archive, each as a user would install it."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both, built as for an index: the archive from the tree, the wheel from the archive."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_bare_resolves_every_extra_and_checks(
    distributions: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    constraint = ["--constraint", str(ROOT / "constraints.txt")]
    # From this release on a dry run reads metadata alone where the index serves it.
    subprocess.run([*pip, "install", "--quiet", "--upgrade", "pip>=24.1"], check=True)
    subprocess.run([*pip, "install", "--quiet", *constraint, str(distributions[kind])], check=True)

    done = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "qwodel"), "check", "--json"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    facts = json.loads(done.stdout)
    assert facts["llama_cpp"]["forward"]["works"] is None
    states = {state["backend"]: state for state in facts["backends"]}
    assert "llama-cpp-python" in states["gguf"]["missing"]
    assert "'llama-cpp-python<0.3.37,>=0.3.36'" in states["gguf"]["install"]

    report = tmp_path / "report.json"
    extras = ",".join([*states, "calibrate", "eval", "ray", "turbo", "dev"])
    command = [*pip, "install", "--quiet", "--dry-run", "--report", str(report), *constraint]
    done = subprocess.run(
        [*command, f"{distributions[kind]}[{extras}]"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    items = json.loads(report.read_text())["install"]
    named = {canonicalize_name(item["metadata"]["name"]) for item in items}
    assert {
        "torch",
        "llama-cpp-python",
        "llmcompressor",
        "coremltools",
        "diffusers",
        "greenlet",
        "ray",
    } <= named


def test_the_archive_holds_what_the_two_commands_need(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "constraints.txt", "scripts/build_llama.py", "scripts/llama_core.cmake"} <= inside
    assert {"vendor/llama.cpp/lock.json", "tests/conftest.py", "CHANGELOG.md", "SECURITY.md"} <= inside


def test_the_wheel_is_above_the_other_package_of_this_name(distributions: dict[str, Path]) -> None:
    """PyPI's qwodel 1.4.0 is another project; an installed copy of this one must never be "upgraded" to it."""
    from packaging.version import Version

    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        lines = wheel.read(metadata).decode().splitlines()
    version = next(line.partition(": ")[2] for line in lines if line.startswith("Version: "))
    assert Version(version) > Version("1.4.0")
