"""Run native work in a child process: its events come back, its death becomes a typed error.

llama.cpp may abort, be killed for memory or fault; in a child none of that takes the
caller down. The protocol is small: the request goes in as one JSON line on standard
input, which then stays open (its end tells the child that the parent is gone); events
come back as JSON lines on a pipe of their own; what the child prints is kept as its
last words.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qwodel.children import child_environment, module_command
from qwodel.exceptions import ConversionError, ResourceError

__all__ = ["NativeFailure", "run_worker"]

_LAST_WORDS = 60
_HEARTBEAT_SECONDS = 0.5


class NativeFailure(ConversionError):  # noqa: N818 - read as a noun where it is caught
    """A child process failed: its last words, newest last, and the signal it died of, if one."""

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        lines: tuple[str, ...] = (),
        signal: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.lines, self.signal = lines, signal


def run_worker(
    task: str,
    request: Mapping[str, Any],
    *,
    on_event: Callable[[dict[str, Any]], None] = lambda _: None,
    on_line: Callable[[str], None] = lambda _: None,
    on_heartbeat: Callable[[], None] = lambda: None,
    offline: bool = True,
) -> dict[str, Any]:
    """Run ``task`` of :mod:`qwodel.backends.gguf.worker` and return its result.

    Args:
        task: the worker's task name.
        request: JSON-ready arguments.
        on_event: receives every event but the final result.
        on_line: receives what the child prints, line by line (``\\r`` ends a line too).
        on_heartbeat: called about twice a second, so that silence can be cancelled.
        offline: forbid the Hugging Face libraries the network.

    Raises:
        NativeFailure: the child raised, died or was killed.
        ResourceError: it ran out of memory or disk.
        Exception: whatever a callback raised, after the child has been killed.
    """
    reader, writer = os.pipe()
    env = child_environment({"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"})
    if offline:
        env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    process = subprocess.Popen(
        module_command("qwodel.backends.gguf.worker", task, str(writer)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(writer,),
        env=env,
        start_new_session=True,
    )
    os.close(writer)
    words: deque[str] = deque(maxlen=_LAST_WORDS)
    result: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        for kind, payload in _streams(process, reader):
            if kind == "heartbeat":
                on_heartbeat()
            elif kind == "line":
                words.append(payload + "\n")
                on_line(payload)
            elif "result" in payload:
                result = payload["result"]
            elif "failure" in payload:
                failure = payload["failure"]
            else:
                if "log" in payload:
                    _remember(words, payload["log"])
                on_event(payload)
    finally:
        _end(process)
        os.close(reader)
    if failure is not None:
        raise _reported(task, failure, words)
    if result is None or process.returncode != 0:
        raise _died(task, process.returncode, words)
    return result


def _remember(words: deque[str], fragment: str) -> None:
    """Add a piece of llama.cpp's log, which comes in parts of lines."""
    if words and not words[-1].endswith("\n"):
        fragment = words.pop() + fragment
    words.append(fragment)


def _streams(process: subprocess.Popen[bytes], events: int) -> Iterator[tuple[str, Any]]:
    """Yield the child's events, printed lines and heartbeats until both streams end."""
    assert process.stdout is not None
    output = process.stdout.fileno()
    pending = {events: b"", output: b""}
    with selectors.DefaultSelector() as selector:
        for descriptor in pending:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(_HEARTBEAT_SECONDS)
            if not ready:
                yield "heartbeat", None
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fd)
                *whole, pending[key.fd] = re.split(rb"[\r\n]", pending[key.fd] + data)
                if not data and pending[key.fd]:
                    whole.append(pending[key.fd])
                for line in filter(None, whole):
                    yield (
                        ("event", json.loads(line))
                        if key.fd == events
                        else ("line", line.decode("utf-8", "replace"))
                    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Make sure the child and whatever it started are gone, and reap it."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=0 if sys.exc_info()[0] else 30)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _reported(task: str, failure: Mapping[str, Any], words: deque[str]) -> Exception:
    """Turn an exception the child reported into ours."""
    if failure["kind"] == "resource":
        return ResourceError(
            failure["message"], hint="free some space, or choose an output_dir on a larger disk"
        )
    if failure["kind"] == "memory":
        return ResourceError(
            f"{task} ran out of memory: {failure['message']}", hint="use a machine with more memory"
        )
    return NativeFailure(failure["message"], lines=_lines(words))


def _lines(words: deque[str]) -> tuple[str, ...]:
    return tuple(line.strip() for line in words)


def _died(task: str, code: int, words: deque[str]) -> Exception:
    last = next((line for line in reversed(_lines(words)) if line), "it said nothing")
    if code < 0:
        name = signal.Signals(-code).name
        if name == "SIGKILL":
            return ResourceError(
                f"the {task} process was killed (SIGKILL), most likely for memory; its last words: {last}",
                hint="use a machine with more memory, or lower nthread",
            )
        return NativeFailure(
            f"the {task} process died of {name}; its last words: {last}", lines=_lines(words), signal=name
        )
    return NativeFailure(
        f"the {task} process ended with code {code}; its last words: {last}", lines=tuple(words)
    )
