"""The child process: one task a run, named on the command line; see :mod:`~qwodel.backends.gguf.native`.

Usage: ``python -m qwodel.backends.gguf.worker TASK EVENT_FD`` with the request as one
JSON line on standard input.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

Emit = Callable[[dict[str, Any]], None]
"""Send one event to the parent."""

_TASKS = {
    "convert": "qwodel.backends.gguf.worker:run_converter_script",
    "quantize": "qwodel.backends.gguf.llama:quantize_and_load",
    "imatrix": "qwodel.backends.gguf.imatrix_collect:collect",
    "forward": "qwodel.backends.gguf.self_check:forward",
    "speak": "qwodel.backends.gguf.self_check:speak",
}


def run_converter_script(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Run llama.cpp's converter script as its own ``__main__``; it prints, the parent reads."""
    script = Path(request["script"])
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *request["arguments"]]
    _refuse_remote_code()
    emit({"started": "convert"})
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise RuntimeError(f"the converter gave up ({stop.code})") from stop
    return {}


def _refuse_remote_code() -> None:
    """Keep transformers from running code of the model directory.

    The converter passes ``trust_remote_code=True`` for some architectures, and
    which architecture it is, the directory itself says.
    """
    from transformers import dynamic_module_utils as dynamic

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("the model directory carries code of its own, and qwodel does not run it")

    def resolve(_: Any, __: Any, has_local_code: bool, has_remote_code: bool, *___: Any, **____: Any) -> bool:
        if has_remote_code and not has_local_code:
            refuse()
        return False

    dynamic.resolve_trust_remote_code = resolve
    dynamic.get_class_in_module = refuse


def _watch_parent() -> None:
    """End this process when the parent is gone, whatever native code is doing."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()


def _failure(error: BaseException) -> dict[str, str]:
    kind = "error"
    if isinstance(error, MemoryError):
        kind = "memory"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        kind = "resource"
    return {"kind": kind, "message": str(error) or type(error).__name__, "type": type(error).__name__}


def _read_request() -> dict[str, Any]:
    # Unbuffered, so that nothing but the request is taken from the pipe.
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    request: dict[str, Any] = json.loads(bytes(line))
    return request


def main() -> None:
    """Do the task named on the command line, send its result or its failure to the parent, and end the process."""
    task, descriptor = sys.argv[1], int(sys.argv[2])
    events = os.fdopen(descriptor, "w", encoding="utf-8", buffering=1)
    request = _read_request()
    _watch_parent()

    def emit(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")

    module, _, function = _TASKS[task].partition(":")
    try:
        if module == __spec__.name:
            result = run_converter_script(request, emit)
        else:
            result = getattr(importlib.import_module(module), function)(request, emit)
    except BaseException as error:  # every failure is the parent's to explain
        import traceback

        traceback.print_exc()
        emit({"failure": _failure(error)})
    else:
        emit({"result": result})
    events.flush()
    # Skips the destructors of half-finished native state; all files are closed by now.
    os._exit(0)


if __name__ == "__main__":
    main()
