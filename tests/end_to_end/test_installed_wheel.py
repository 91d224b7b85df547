"""The wheel in a bare environment: light, honest about what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with qwodel's wheel and its core dependencies alone."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), str(ROOT)], check=True)
    return folder


def _run(venv: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(venv / "bin" / "qwodel"), *arguments], capture_output=True, text=True, check=False, cwd=cwd
    )


@pytest.mark.slow
def test_a_bare_install_lists_everything_and_says_what_is_missing(bare: Path, tmp_path: Path) -> None:
    done = _run(bare, "list-backends", "--json", cwd=tmp_path)
    states = {state["backend"]: state for state in json.loads(done.stdout)}
    assert states["gguf"]["state"].startswith("needs llama-cpp-python, gguf")
    assert "-m pip install " in states["gguf"]["install"]
    assert "'llama-cpp-python<0.3.37,>=0.3.36'" in states["gguf"]["install"]
    assert {"awq", "coreml", "fp8", "int8", "segquant", "smoothquant"} < set(states)
    formats = json.loads(_run(bare, "list-formats", "gguf", "--json", cwd=tmp_path).stdout)
    assert len(formats) >= 35


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["awq", "coreml", "fp8", "gguf", "int8", "segquant", "smoothquant"])
def test_using_a_backend_without_its_extra_is_a_dependency_error(
    bare: Path, tmp_path: Path, backend: str
) -> None:
    (tmp_path / "model").mkdir()
    done = _run(bare, "quantize", "model", "-b", backend, "-f", "any", cwd=tmp_path)
    assert done.returncode == 3
    assert f"the {backend} backend needs" in done.stderr
    assert f"(the packages of qwodel[{backend}])" in done.stderr
    assert "hint: pip install " in done.stderr
    assert "'torch<2.15,>=2.10'" in done.stderr


@pytest.mark.slow
def test_the_wheel_carries_the_lock_and_the_types(bare: Path, tmp_path: Path) -> None:
    code = (
        "import qwodel, pathlib; from qwodel.backends.gguf.toolchain import lock, installed_converter; "
        "print(lock()['sha256'], installed_converter(), (pathlib.Path(qwodel.__file__).parent / 'py.typed').exists())"
    )
    environment = {"QWODEL_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [str(bare / "bin" / "python"), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    expected = json.loads((ROOT / "vendor" / "llama.cpp" / "lock.json").read_text())["sha256"]
    assert done.stdout.split() == [expected, "None", "True"]
