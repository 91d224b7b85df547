"""Whether the installed llama.cpp runs on this machine, and what to do where it does not.

llama-cpp-python is compiled where it is installed. On an Intel CPU with AMX, gcc 12 compiles
llama.cpp's AMX kernels into code that dies of an illegal instruction
(https://github.com/ggml-org/llama.cpp/pull/26954), and a library compiled on another machine
may use instructions this one lacks. So models are run in a child process here.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

from qwodel.backends.gguf.answers import ForwardPass, SpokenAnswer
from qwodel.backends.gguf.native import NativeFailure, run_worker
from qwodel.exceptions import DependencyError

__all__ = ["RuntimeState", "check_runtime", "reinstall_command", "speak"]

_WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


@dataclass(frozen=True, slots=True)
class RuntimeState:
    """What came of a tiny forward pass: it works, or the problem and the command that cures it."""

    works: bool
    problem: str | None = None
    cure: str | None = None


def check_runtime() -> RuntimeState:
    """Run a tiny model in a child process, with the settings every llama.cpp program starts with."""
    try:
        result = cast("ForwardPass", run_worker("forward", {}))
    except NativeFailure as failure:
        if failure.signal is None:
            return RuntimeState(False, f"llama.cpp's forward pass fails: {failure}", reinstall_command())
        return RuntimeState(False, _died(failure), reinstall_command())
    if not result["finite"]:
        return RuntimeState(
            False, "llama.cpp's forward pass gives numbers that are not finite", reinstall_command()
        )
    return RuntimeState(True)


def speak(path: Path, question: str) -> tuple[str, float]:
    """Let the chat model at ``path`` answer in a child process; return the answer and tokens per second.

    Raises:
        DependencyError: llama.cpp dies of a signal here; the hint is the command that reinstalls it.
        NativeFailure: it cannot load or run the model.
    """
    try:
        result = cast("SpokenAnswer", run_worker("speak", {"path": str(path), "question": question}))
    except NativeFailure as failure:
        if failure.signal is None:
            raise
        raise DependencyError(
            f"{path} is made and verified, but {_died(failure)}", hint=reinstall_command()
        ) from failure
    return result["answer"], result["speed"]


def reinstall_command() -> str:
    """Return the command that compiles llama-cpp-python for this machine's CPU, safely and anew."""
    try:
        release = f"=={version('llama-cpp-python')}"
    except PackageNotFoundError:
        release = ""
    flags = f"CFLAGS='{_WITHOUT_AMX}' CXXFLAGS='{_WITHOUT_AMX}' " if _has_amx() else ""
    return (
        f"{flags}pip install --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python "
        f"llama-cpp-python{release}"
    )


def _died(failure: NativeFailure) -> str:
    why = ": it was compiled into instructions that this CPU refuses" if failure.signal == "SIGILL" else ""
    return f"the installed llama.cpp dies of {failure.signal} when a model runs{why}"


def _has_amx() -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        return " amx_tile" in Path("/proc/cpuinfo").read_text("ascii", "replace")
    except OSError:
        return False
