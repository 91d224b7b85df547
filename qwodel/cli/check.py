"""``qwodel check``: what is installed, which hardware there is, what is missing and how to get it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, TypedDict

from qwodel.cli.arguments import JsonFlag

__all__ = ["backend_states", "check"]


class BackendState(TypedDict):
    """Whether a backend is ready, the packages it lacks, and the command that installs them."""

    backend: str
    state: str
    missing: list[str]
    install: str | None


class RuntimeFacts(TypedDict):
    """Whether llama.cpp's forward pass works, and if not, why and what helps; ``None`` where it is not installed."""

    works: bool | None
    problem: str | None
    cure: str | None


class ConverterFacts(TypedDict):
    """llama.cpp's release, where its converter is, and the architectures it takes."""

    release: str
    converter: str
    architectures: list[str]


def check(json_: JsonFlag = False) -> None:
    """Show what this machine has, what each backend still needs, and how to get it."""
    import platform

    from qwodel.cli.report import human_bytes, print_json, print_table, say
    from qwodel.hardware import available_memory, cpu_count, list_gpus
    from qwodel.version import __version__

    gpus = list_gpus()
    backends, llama_cpp = backend_states(), _llama_cpp()
    forward = _forward_pass(backends)
    facts: dict[str, Any] = {
        "qwodel": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": cpu_count(),
        "free_memory": available_memory(),
        "gpus": [{"name": gpu.name, "total": gpu.total, "free": gpu.free} for gpu in gpus],
        "llama_cpp": {**llama_cpp, "forward": forward},
        "backends": backends,
    }
    if json_:
        print_json(facts)
        return
    say(f"qwodel {__version__}, Python {facts['python']} on {facts['platform']}")
    say(f"{facts['cpus']} CPUs, {human_bytes(facts['free_memory'])} memory free")
    for gpu in gpus:
        say(f"GPU: {gpu.name}, {human_bytes(gpu.free)} of {human_bytes(gpu.total)} free")
    if not gpus:
        say("no CUDA GPU found (AWQ will be slow; GGUF needs none)")
    say(f"llama.cpp converter: {llama_cpp['converter']}")
    if forward["works"] is not None:
        say(f"llama.cpp forward pass: {forward['problem'] or 'works'}")
    rows = [(s["backend"], s["state"], s["install"] or "") for s in backends]
    print_table(["backend", "state", "to install"], rows)


def backend_states() -> list[BackendState]:
    """Return, for every backend, whether it is ready and the command that would make it so."""
    from qwodel.backends import backend_names, is_available, missing_packages
    from qwodel.extras import install_command

    states: list[BackendState] = []
    for name in backend_names():
        missing = missing_packages(name)
        if not is_available(name):
            state = "not in this release"
        else:
            state = f"needs {', '.join(missing)}" if missing else "ready"
        install = (
            f"{Path(sys.executable).name} -m {install_command(name)}"
            if missing and is_available(name)
            else None
        )
        states.append({"backend": name, "state": state, "missing": missing, "install": install})
    return states


def _forward_pass(states: list[BackendState]) -> RuntimeFacts:
    """Try the installed llama.cpp in a child; where it fails, say so in the gguf backend's state too."""
    gguf = next(state for state in states if state["backend"] == "gguf")
    if "llama-cpp-python" in gguf["missing"] or "gguf" in gguf["missing"]:
        return {"works": None, "problem": None, "cure": None}
    from qwodel.backends.gguf.runtime import check_runtime

    state = check_runtime()
    if not state.works:
        gguf["state"], gguf["install"] = "its llama.cpp does not run", state.cure
    return {"works": state.works, "problem": state.problem, "cure": state.cure}


def _llama_cpp() -> ConverterFacts:
    from qwodel.backends.gguf.toolchain import installed_converter, lock
    from qwodel.exceptions import DependencyError

    try:
        tool = installed_converter()
    except DependencyError as error:
        return {"release": lock()["release"], "converter": str(error), "architectures": []}
    if tool is None:
        where = f"not laid yet; comes with the first conversion ({lock()['release']}, 77 MB once)"
        return {"release": lock()["release"], "converter": where, "architectures": []}
    return {
        "release": os.environ.get("QWODEL_LLAMA_CPP") or lock()["release"],
        "converter": str(tool.root),
        "architectures": tool.architectures(),
    }
