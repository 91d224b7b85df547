"""Whether the installed llama.cpp runs here, and what is said where it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwodel import Quantizer
from qwodel.backends.gguf import runtime
from qwodel.backends.gguf.native import run_worker
from qwodel.exceptions import ConversionError, IntegrityError

DIES = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
"""A library compiled into instructions that this CPU refuses does this when a model runs."""


def test_the_installed_llama_cpp_runs_a_tiny_model() -> None:
    assert runtime.check_runtime() == runtime.RuntimeState(works=True)


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """An environment whose ``llama_cpp`` imports, and dies of SIGILL as soon as it loads a model."""
    package = tmp_path / "broken" / "llama_cpp"
    package.mkdir(parents=True)
    body = f"class Llama:\n    def __init__(self, *_, **__):\n        {DIES.splitlines()[0]}\n        {DIES.splitlines()[1]}\n"
    real = (
        "import importlib.util, sys, pathlib\n"
        "for entry in sys.path:\n"
        "    found = pathlib.Path(entry) / 'llama_cpp' / '__init__.py'\n"
        "    if found.is_file() and found != pathlib.Path(__file__):\n"
        "        __path__ = [str(found.parent)]\n"
        "        break\n"
        "from llama_cpp.llama_cpp import *\n"
    )
    (package / "__init__.py").write_text(real + body)
    return {"PYTHONPATH": os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])}


def _qwodel(environment: dict[str, str], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwodel", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env=os.environ | environment
    )


def test_check_says_that_llama_cpp_dies_and_how_to_reinstall_it(
    broken: dict[str, str], tmp_path: Path
) -> None:
    done = _qwodel(broken, "check", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    forward = facts["llama_cpp"]["forward"]
    assert forward["works"] is False
    assert "dies of SIGILL when a model runs" in forward["problem"]
    assert "pip install --force-reinstall --no-deps --no-cache-dir" in forward["cure"]
    (gguf,) = (state for state in facts["backends"] if state["backend"] == "gguf")
    assert gguf["state"] == "its llama.cpp does not run"
    assert gguf["install"] == forward["cure"]
    assert "dies of SIGILL" in _qwodel(broken, "check", cwd=tmp_path).stdout


def test_a_model_that_cannot_speak_here_is_an_error_with_the_cure(
    broken: dict[str, str], tmp_path: Path
) -> None:
    code = (
        "from pathlib import Path; from qwodel.backends.gguf.runtime import speak\n"
        "from qwodel.exceptions import DependencyError\n"
        "try: speak(Path('model.gguf'), 'Hello?')\n"
        "except DependencyError as error: print(error); print(error.hint)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=tmp_path, env=os.environ | broken,
    )  # fmt: skip
    cause, hint = done.stdout.splitlines()
    assert cause.startswith("model.gguf is made and verified, but the installed llama.cpp dies of SIGILL")
    assert "--no-binary llama-cpp-python llama-cpp-python==" in hint


def test_the_command_leaves_amx_out_only_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_has_amx", lambda: True)
    assert runtime.reinstall_command().startswith(
        "CFLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16' CXXFLAGS="
    )
    monkeypatch.setattr(runtime, "_has_amx", lambda: False)
    assert runtime.reinstall_command().startswith("pip install --force-reinstall")


def test_speaking_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConversionError):
        runtime.speak(tmp_path / "nothing.gguf", "Hello?")


def test_every_result_is_run_before_it_is_published(short_smollm2_gguf: Path, tmp_path: Path) -> None:
    quantizer = Quantizer("gguf", short_smollm2_gguf, tmp_path)
    quantizer.quantize("Q8_0")
    assert quantizer.get_model_info()["loaded"]["forward_tokens"] == 8


def test_a_result_that_computes_nothing_finite_is_not_published(
    short_smollm2_gguf: Path, tmp_path: Path
) -> None:
    """The last norm holds numbers that are finite, and overflow as soon as they are used."""
    from qwodel.gguf_header import read_gguf_header

    source = tmp_path / "huge.gguf"
    data = bytearray(short_smollm2_gguf.read_bytes())
    norm = read_gguf_header(short_smollm2_gguf).tensors["output_norm.weight"]
    data[norm.begin : norm.begin + norm.nbytes] = np.full(norm.numel, 3e38, np.float32).tobytes()
    source.write_bytes(data)
    with pytest.raises(IntegrityError, match="not finite"):
        Quantizer("gguf", source, tmp_path / "out").quantize("Q8_0")
    assert not (tmp_path / "out").exists()


def test_an_unknown_death_keeps_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConversionError) as caught:
        run_worker("speak", {"path": str(tmp_path / "none.gguf"), "question": ""})
    assert getattr(caught.value, "signal", "unset") is None
