"""Compile llama-cpp-python for this machine and install it into the running interpreter's environment.

pip compiles it too, but all of it (the vision tool, the server's parts), in silence, and on an Intel
CPU with AMX into kernels that die of an illegal instruction where gcc 12 is the compiler
(https://github.com/ggml-org/llama.cpp/pull/26954). Here only the libraries that the package loads
are compiled, without AMX, with a line of progress; the wheel is kept in qwodel's cache for other
environments of this machine. ``CMAKE_ARGS`` (for CUDA, say), ``CC`` and ``CXX`` are honoured.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOOK = ROOT / "scripts" / "llama_core.cmake"
WITHOUT_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def main() -> None:
    version = _version()
    if _installed() == version:
        return
    cache = _cache() / "wheels" / f"llama-cpp-python-{version}-{_key(version)}"
    wheel = next(cache.glob("*.whl"), None)
    if wheel is None:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as scratch:
            made = _compile(version, Path(scratch))
            wheel = made.replace(cache / made.name)
    else:
        print(f"llama.cpp: compiled before on this machine ({wheel})", flush=True)
    # Its own requirements are light and come with the rest of the environment.
    subprocess.run([*PIP, "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)], check=True)


def _version() -> str:
    pins = (ROOT / "constraints.txt").read_text("utf-8")
    match = re.search(r"^llama-cpp-python==(\S+)", pins, re.MULTILINE)
    if match is None:
        sys.exit("constraints.txt does not pin llama-cpp-python")
    return match[1]


def _installed() -> str | None:
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return None


def _cache() -> Path:
    given = os.environ.get("QWODEL_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "qwodel"


def _key(version: str) -> str:
    """Name what decides the compiled bytes: the CPU's instructions, the compiler, the settings."""
    parts = [
        version,
        platform.platform(),
        _cpu(),
        _output([*_compiler("CC"), "--version"]),
        os.environ.get("CMAKE_ARGS", ""),
        HOOK.read_text("utf-8"),
        *WITHOUT_AMX,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"])
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _compiler(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable) or ("cc" if variable == "CC" else "c++"))


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def _knows(compiler: list[str], flags: tuple[str, ...]) -> bool:
    """Whether the compiler takes these flags; one that does not would not use AMX either."""
    try:
        done = subprocess.run(
            [*compiler, *flags, "-x", "c", "-E", os.devnull], capture_output=True, check=False
        )
    except OSError:
        sys.exit(
            f"no C compiler: {' '.join(compiler)} cannot be started; install gcc or clang (and make it CC)"
        )
    return done.returncode == 0


def _compile(version: str, scratch: Path) -> Path:
    environment = dict(os.environ)
    if platform.machine() in ("x86_64", "AMD64"):
        for variable, compiler in (("CFLAGS", "CC"), ("CXXFLAGS", "CXX")):
            if _knows(_compiler(compiler), WITHOUT_AMX):
                given = environment.get(variable, "")
                environment[variable] = " ".join([given, *WITHOUT_AMX]).strip()
    defines = ["LLAVA_BUILD=OFF", f"CMAKE_PROJECT_llama.cpp_INCLUDE={HOOK}"]
    environment |= {"SKBUILD_BUILD_TARGETS": "llama", "SKBUILD_CMAKE_DEFINE": ";".join(defines)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    minutes = max(1, round(4.5 / cores))
    print(
        f"llama.cpp: compiling llama-cpp-python {version} on {cores} cores, about {minutes} minutes, once on this machine",
        flush=True,
    )
    log = scratch.parent / "build.log"
    command = [*PIP, "wheel", "-v", "--no-deps", "--no-cache-dir", "--no-binary", "llama-cpp-python"]
    command += ["--wheel-dir", str(scratch), f"llama-cpp-python=={version}"]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        for line in _with_progress(process.stdout):
            file.write(line)
    if process.wait() != 0:
        print("".join(log.read_text("utf-8").splitlines(keepends=True)[-25:]), file=sys.stderr)
        sys.exit(f"llama.cpp did not compile; the whole log is {log}")
    return next(scratch.glob("*.whl"))


def _with_progress(lines: Iterator[str]) -> Iterator[str]:
    """Pass lines on, and print how far the compiler is about every ten seconds."""
    shown = started = time.monotonic()
    for line in lines:
        yield line
        step = re.match(r"\s*\[(\d+)/(\d+)\]", line)
        now = time.monotonic()
        if step and now - shown >= 10:
            print(f"llama.cpp: {step[1]} of {step[2]} files, {now - started:.0f} s", flush=True)
            shown = now


if __name__ == "__main__":
    main()
