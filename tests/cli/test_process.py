"""The command line as cron, a pipe, a closing terminal and an impatient user meet it."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

QWODEL = [sys.executable, "-m", "qwodel"]
HOSTILE = "[/nope]\x1b]0;owned\x07\x9b31m\u202e\u200b.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that a run takes a moment."""
    folder = tmp_path_factory.mktemp("models") / "model"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(
        {f"layers.{n}.proj.weight": torch.randn(512, 512) for n in range(8)}, folder / "model.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that learning its rounding takes half a minute on any machine."""
    folder = tmp_path_factory.mktemp("models") / "model"
    folder.mkdir()
    torch.manual_seed(0)
    weights = {f"layers.{n}.proj.weight": torch.randn(2048, 2048).bfloat16() for n in range(8)}
    save_file(weights, folder / "model.safetensors")
    return folder


def shell(line: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", line, "sh", *QWODEL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_closed_streams_stop_nothing_and_end_up_in_no_file(model: Path, tmp_path: Path, closed: str) -> None:
    arguments = ("quantize", model, "-b", "int8", "-f", "int8_row", "-o", tmp_path, "--verbose")
    done = shell(f'exec "$@" {closed}', *arguments)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    manifest = json.loads((tmp_path / "model-int8_row.manifest.json").read_text())
    assert manifest["outputs"]
    done = shell(f'exec "$@" {closed}', "quantize", tmp_path / "none", "-b", "int8", "-f", "int8_row")
    assert done.returncode == 2


@pytest.mark.parametrize(
    "arguments", [("list-formats",), ("list-options", "gguf"), ("inspect", "{model}", "--tensors")]
)
def test_a_reader_that_leaves_gets_no_traceback(model: Path, arguments: tuple[str, ...]) -> None:
    done = shell('"$@" | head -n 1', *(each.format(model=model) for each in arguments))
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_progress_into_a_closed_pipe_does_not_stop_the_run(model: Path, tmp_path: Path) -> None:
    arguments = ("quantize", model, "-b", "int8", "-f", "int8_row", "-o", tmp_path)
    done = shell('"$@" 2>&1 | head -n 1', *arguments)
    assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "model-int8_row.safetensors").is_file()


def _started(model: Path, out: Path, *before: str) -> subprocess.Popen[str]:
    """A run that is at work, and would be for long."""
    command = [
        *before, *QWODEL, "quantize", str(model), "-b", "int8", "-f", "int8_row", "-o", str(out),
        "-O", "optimizer=original", "-O", "num_iter=100000",
    ]  # fmt: skip
    # A shell that put the tests into the background has these ignored.
    heard = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in heard],
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "quantize" in line and list(out.glob(".qwodel-*/model-int8_row.safetensors")):
            break
    time.sleep(0.5)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("times", [1, 20])
def test_what_interrupts_leaves_nothing_however_often(
    large: Path, tmp_path: Path, number: signal.Signals, times: int
) -> None:
    process = _started(large, tmp_path / "out")
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.02)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.rstrip().endswith("interrupted; nothing was published")
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_nohup_is_respected(large: Path, tmp_path: Path) -> None:
    process = _started(large, tmp_path / "out", "nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("quantize", "{model}", "-o", "~nosuchuser/out"), "home of a user who is not known"),
        (("quantize", "~nosuchuser/model"), "home of a user who is not known"),
        (("inspect", "~nosuchuser/model"), "home of a user who is not known"),
        (("quantize", "x" * 5000 + "/y/z"), "File name too long"),
        (("quantize", "{model}", "-o", "o" * 300), "File name too long"),
        (("quantize", "{model}", "-o", "{model}/model.safetensors/out"), "Not a directory"),
        (("quantize", "{long}"), "names there have at most"),
    ],
)
def test_paths_that_cannot_be_are_errors_with_a_cause(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], cause: str
) -> None:
    long = tmp_path / ("n" * 250)
    long.mkdir()
    os.link(model / "model.safetensors", long / "model.safetensors")
    told = [each.format(model=model, long=long) for each in arguments]
    rest = ["-b", "int8", "-f", "int8_row"] if told[0] == "quantize" else []
    done = subprocess.run([*QWODEL, *told, *rest], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert cause in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 2000


def test_a_limit_of_memory_is_a_resource_error(tmp_path: Path) -> None:
    save_file({"layers.0.proj.weight": torch.randn(8192, 8192)}, tmp_path / "big.safetensors")

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # A torch with CUDA maps gigabytes before it has done anything.
    imported = (
        "import qwodel.backends.int8, qwodel.checkpoint.run.verify; print(open('/proc/self/status').read())"
    )
    told = subprocess.run(
        [sys.executable, "-c", imported], capture_output=True, text=True, check=True, env=environment
    ).stdout
    (peak,) = (int(line.split()[1]) << 10 for line in told.splitlines() if line.startswith("VmPeak"))
    size = peak + 780_000_000

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    command = [*QWODEL, "quantize", str(tmp_path / "big.safetensors"), "-b", "int8", "-f", "int8_row"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out"), "-O", "optimizer=original", "-O", "workers=1", "-O", "num_iter=2"],
        capture_output=True, text=True, check=False, preexec_fn=limit, env=environment,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "memory" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    save_file(
        {HOSTILE: torch.randn(64, 64), "b\nhint: rm -rf": torch.randn(64, 64)}, tmp_path / "m.safetensors"
    )
    return tmp_path / "m.safetensors"


def _on_a_terminal(*arguments: object) -> tuple[int, str]:
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen([*QWODEL, *map(str, arguments)], stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    seen = b""
    while True:
        try:
            seen += os.read(master, 4096)
        except OSError:
            break
    os.close(master)
    return process.wait(), seen.decode()


def _raw(text: str) -> set[str]:
    return {each for each in ("\x1b]", "\x07", "\x9b", "\u202e", "\u200b") if each in text}


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "{model}", "--tensors"),
        ("plan", "{model}", "-b", "int8", "-f", "int8_row"),
        ("quantize", "{model}", "-b", "int8", "-f", "int8_row", "-o", "{out}", "--verbose"),
        ("quantize", "{model}", "-b", "int8", "-f", "int8_row", "-o", "{out}", "--json", "-q"),
        ("quantize", "{model}\x1b]0;owned\x07", "-b", "int8", "-f", "int8_row", "-o", "{out}"),
    ],
)
def test_names_from_files_reach_no_terminal_raw(
    hostile: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    told = [each.format(model=hostile, out=tmp_path / "out") for each in arguments]
    code, seen = _on_a_terminal(*told)
    assert code in (0, 2), seen
    assert "Traceback" not in seen
    assert not _raw(seen)
    assert not any(line.startswith("hint: rm") for line in seen.splitlines())
    done = subprocess.run(
        [*QWODEL, *told, "--overwrite"][: None if told[0] == "quantize" else -1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not _raw(done.stdout + done.stderr)


def test_log_lines_are_safe() -> None:
    program = (
        "import logging\n"
        "from qwodel.process import prepare_process\n"
        "prepare_process()\n"
        f"logging.getLogger('toolchain').warning('%s', {HOSTILE!r} + chr(10) + 'error: forged')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not _raw(done.stderr)
    assert done.stderr.splitlines()[0].startswith("WARNING toolchain: [/nope]\\x1b]0;owned")
    assert done.stderr.splitlines()[1] == "  error: forged"


@pytest.mark.parametrize(
    ("error", "code"),
    [("ValidationError", 2), ("DependencyError", 3), ("ResourceError", 4), ("CalibrationError", 5), ("IntegrityError", 1)],
)  # fmt: skip
def test_every_program_ends_with_the_documented_code(error: str, code: int) -> None:
    program = (
        "from qwodel.exceptions import *\n"
        "from qwodel.process import main_of\n"
        f"def run(): raise {error}('cause', hint='cure')\n"
        "main_of(run)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.splitlines() == ["error: cause", "hint: cure"]


def test_json_stays_exact(hostile: Path) -> None:
    done = subprocess.run(
        [*QWODEL, "inspect", str(hostile), "--tensors", "--json"], capture_output=True, check=True
    )
    assert not _raw(done.stdout.decode())
    assert {each["name"] for each in json.loads(done.stdout)["tensor_list"]} == {HOSTILE, "b\nhint: rm -rf"}


def test_a_name_that_is_no_utf8_stops_nothing(hostile: Path, tmp_path: Path) -> None:
    odd = hostile.rename(tmp_path / "odd\udcff.safetensors")
    command = [*QWODEL, "quantize", str(odd), "-b", "int8", "-f", "int8_row", "-o", str(tmp_path / "out")]
    done = subprocess.run([*command, "-q"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    # A script can use what it is given.
    assert Path(os.fsdecode(done.stdout.rstrip(b"\n"))).is_file()
    done = subprocess.run([*command, "--json", "--overwrite", "-q"], capture_output=True, check=True)
    assert json.loads(done.stdout)["quantized_model"].endswith("odd\udcff-int8_row.safetensors")
    assert (
        "\\udcff"
        in subprocess.run([*command, "--overwrite"], capture_output=True, check=True, text=True).stdout
    )
