from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from qwodel.children import child_environment, module_command, safe_spawning

HOSTILE = ("json", "uuid", "torch", "struct", "pickle", "selectors", "numpy")


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A present folder whose modules leave a mark when they are imported."""
    for name in HOSTILE:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _paths(environment: dict[str, str]) -> list[str]:
    code = "import json, sys; print(json.dumps(sys.path))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    found: list[str] = json.loads(done.stdout)
    return found


def test_the_present_folder_is_on_no_childs_path(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", str(hostile), *sys.path])
    paths = _paths(child_environment())
    assert str(hostile) not in paths
    assert "" not in paths
    assert not (hostile / "RAN").exists()


def test_what_the_user_states_and_what_was_added_here_stays(
    hostile: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated, added = (str(tmp_path_factory.mktemp(name)) for name in ("stated", "added"))
    monkeypatch.setenv("PYTHONPATH", stated)
    monkeypatch.setattr(sys, "path", [added, stated, *sys.path])
    environment = child_environment({"EXTRA": "1"})
    paths = _paths(environment)
    assert paths.index(added) < paths.index(stated)
    assert environment["EXTRA"] == "1"
    # The user may want the present folder, and says so.
    monkeypatch.setenv("PYTHONPATH", str(hostile / ".." / hostile.name))
    monkeypatch.setattr(sys, "path", [str(hostile), *sys.path])
    assert str(hostile) in child_environment()["PYTHONPATH"].split(os.pathsep)


def test_grandchildren_are_safe_too(hostile: Path) -> None:
    inner = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'qwodel.backends.gguf.toolchain'])"
    subprocess.run(
        [sys.executable, "-P", "-c", inner], env=child_environment(), capture_output=True, check=True
    )
    subprocess.run(module_command("uuid"), env=child_environment(), capture_output=True, check=False)
    assert not (hostile / "RAN").exists()


def test_spawned_workers_are_safe_and_the_environment_is_given_back(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with safe_spawning():
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with pool:
        with safe_spawning(), safe_spawning():
            future = pool.submit(os.getpid)
        assert future.result() != os.getpid()
    assert "PYTHONSAFEPATH" not in os.environ
    assert not (hostile / "RAN").exists()
