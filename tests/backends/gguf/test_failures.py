"""What goes wrong, provoked for real: a typed error, nothing published, nothing left over."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwodel import Quantizer, quantize
from qwodel.backends.gguf.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from qwodel.backends.gguf.native import NativeFailure, run_worker
from qwodel.exceptions import (
    CalibrationError,
    Cancelled,
    ConfigurationError,
    ConversionError,
    IntegrityError,
    QuantizationError,
    ResourceError,
    ValidationError,
)

TEXT = ["The cat sat on the mat and looked at the small red bird. " * 40]


def _left_over(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


def _copy(source: Path, target: Path, **config: object) -> Path:
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        path.chmod(0o644)
    file = target / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return target


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda m: (m / "config.json").unlink(), ValidationError, r"has no config\.json"),
        (lambda m: (m / "tokenizer.model").unlink(), ValidationError, "has no tokenizer"),
        (lambda m: (m / "config.json").write_text("{"), ValidationError, "not readable JSON"),
        (lambda m: os.truncate(m / "model.safetensors", 9999), IntegrityError, "truncated"),
        (lambda m: (m / "model.safetensors").unlink(), ValidationError, "holds no model weights"),
    ],
    ids=["no config", "no tokenizer", "broken config", "truncated weights", "no weights"],
)
def test_a_damaged_directory_is_refused_before_work(
    stories15m: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    error: type[QuantizationError],
    message: str,
) -> None:
    model = _copy(stories15m, tmp_path / "model")
    damage(model)
    with pytest.raises(error, match=message):
        quantize(model, tmp_path / "out", "gguf", "Q8_0")
    assert _left_over(tmp_path / "out") == []


def test_an_unsupported_architecture_is_refused_before_any_weight_is_read(
    stories15m: Path, tmp_path: Path
) -> None:
    model = _copy(stories15m, tmp_path / "model", architectures=["LlamaForCasualLM"])
    seen: list[str] = []
    with pytest.raises(ValidationError, match="does not support the architecture LlamaForCasualLM") as caught:
        quantize(model, tmp_path / "out", "gguf", "Q8_0", lambda _, stage, __: seen.append(stage))
    assert "'LlamaForCausalLM'" in (caught.value.hint or "")
    assert set(seen) == {"resolve"}


def test_input_formats_the_backend_does_not_take(stories15m: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="takes a Hugging Face model directory or a .gguf file"):
        Quantizer("gguf", stories15m / "model.safetensors")


def test_a_format_that_needs_a_matrix_says_so_before_work(stories15m: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="IQ1_S needs an importance matrix") as caught:
        quantize(stories15m, tmp_path / "out", "gguf", "IQ1_S")
    assert "calibration_dataset" in (caught.value.hint or "")
    with pytest.raises(ConfigurationError, match="exclude each other"):
        quantize(stories15m, tmp_path, "gguf", "Q4_0", imatrix="x", calibration_dataset="y")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"tensor_types": {"attn_vv": "Q8_0"}},
            ConfigurationError,
            "no tensor of the model matches 'attn_vv'",
        ),
        (
            {"token_embedding_type": "Q6_K"},
            ConfigurationError,
            "needs rows that divide by 256, and token_embd",
        ),
        ({"imatrix": "none.gguf"}, CalibrationError, "does not exist"),
        ({"calibration_dataset": ["too short"]}, CalibrationError, "has 4 tokens, and one sample needs 256"),
        ({"calibration_dataset": "nowhere.txt"}, CalibrationError, "does not exist"),
    ],
)
def test_options_that_do_not_fit_the_model(
    stories_gguf: Path,
    tmp_path: Path,
    options: dict[str, object],
    error: type[QuantizationError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        quantize(stories_gguf, tmp_path / "out", "gguf", "Q4_0", **options)
    assert _left_over(tmp_path / "out") == []


def test_a_matrix_of_another_model_is_refused(stories_gguf: Path, tmp_path: Path) -> None:
    quantizer = Quantizer(
        "gguf", stories_gguf, tmp_path, calibration_dataset=TEXT, seq_length=32, num_samples=1
    )
    quantizer.quantize("Q8_0")
    matrix = read_imatrix(tmp_path / quantizer.get_model_info()["importance_matrix"]["file"])
    renamed = ImportanceMatrix({f"x.{n}": e for n, e in matrix.entries.items()}, ("t",), 1, 32)
    write_imatrix(renamed, tmp_path / "renamed.gguf")
    with pytest.raises(CalibrationError, match="names none of this model's tensors"):
        quantize(stories_gguf, tmp_path / "out", "gguf", "Q4_0", imatrix=tmp_path / "renamed.gguf")
    swapped = {"blk.0.attn_q.weight": matrix.entries["blk.0.ffn_down.weight"]}
    write_imatrix(ImportanceMatrix(swapped, ("t",), 1, 32), tmp_path / "swapped.gguf")
    with pytest.raises(
        CalibrationError, match=r"blk\.0\.attn_q\.weight has 288 input channels, and the matrix 768"
    ):
        quantize(stories_gguf, tmp_path / "out", "gguf", "Q4_0", imatrix=tmp_path / "swapped.gguf")
    few = {name: entry for name, entry in matrix.entries.items() if "ffn_down" not in name}
    write_imatrix(ImportanceMatrix(few, ("t",), 1, 32), tmp_path / "few.gguf")
    with pytest.raises(CalibrationError, match="Missing importance matrix for tensor blk.0.ffn_down.weight"):
        quantize(stories_gguf, tmp_path / "out", "gguf", "IQ2_XXS", imatrix=tmp_path / "few.gguf")
    assert _left_over(tmp_path / "out") == []


def test_the_converters_own_error_is_the_message(stories15m: Path, tmp_path: Path) -> None:
    model = _copy(stories15m, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mystery.weight"] = torch.ones(3, 3)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConversionError, match=r"Can not map tensor 'model\.layers\.0\.mystery\.weight'"
    ) as caught:
        quantize(model, tmp_path / "out", "gguf", "Q8_0")
    assert isinstance(caught.value.__cause__, NativeFailure)
    assert any("Traceback" in line for line in caught.value.__cause__.lines)
    assert _left_over(tmp_path / "out") == []


def test_weights_that_are_not_finite_are_refused(stories15m: Path, tmp_path: Path) -> None:
    model = _copy(stories15m, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantizationError):
        quantize(model, tmp_path / "out", "gguf", "Q4_0")
    assert _left_over(tmp_path / "out") == []


EVIL = """
open({marker!r}, "w").write("ran")
from transformers import PreTrainedTokenizerFast
class EvilTokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.mark.parametrize("architecture", ["DreamModel", "LLaDAModelLM"])
def test_code_in_a_model_directory_never_runs(
    stories15m: Path, smollm2: Path, tmp_path: Path, architecture: str
) -> None:
    """The converter trusts remote code for these architectures, and the directory says which it is."""
    marker = tmp_path / "ran"
    model = _copy(stories15m, tmp_path / "model", architectures=[architecture])
    (model / "tokenizer.model").unlink()
    shutil.copy(smollm2 / "tokenizer.json", model)
    (model / "tokenization_evil.py").write_text(EVIL.format(marker=str(marker)))
    auto_map = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}
    config = {"auto_map": auto_map, "tokenizer_class": "EvilTokenizer"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValidationError, match="carries code of its own, and qwodel does not run it"):
        quantize(model, tmp_path / "out", "gguf", "Q8_0")
    assert not marker.exists()
    assert _left_over(tmp_path / "out") == []


@pytest.mark.parametrize("stage", ["resolve", "convert", "quantize", "verify", "publish"])
def test_a_raising_callback_cancels_in_every_stage(stories15m: Path, tmp_path: Path, stage: str) -> None:
    def stop(percent: int, now: str, message: str) -> None:
        if now == stage:
            raise KeyError("stop")

    out = tmp_path / "out"
    with pytest.raises(Cancelled, match=f"cancelled by the progress callback during {stage}"):
        quantize(stories15m, out, "gguf", "Q8_0", stop)
    assert _left_over(out) == []
    assert not [child for child in psutil.Process().children(recursive=True) if child.status() != "zombie"]


def test_calibration_can_be_cancelled(stories_gguf: Path, tmp_path: Path) -> None:
    def stop(percent: int, now: str, message: str) -> None:
        if "sample 2" in message:
            raise RuntimeError("stop")

    with pytest.raises(Cancelled):
        quantize(
            stories_gguf,
            tmp_path / "out",
            "gguf",
            "Q4_0",
            stop,
            calibration_dataset=TEXT,
            seq_length=32,
            num_samples=8,
        )
    assert _left_over(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (signal.SIGSEGV, ConversionError, "the quantize process died of SIGSEGV; its last words: .*blk"),
        (signal.SIGABRT, ConversionError, "died of SIGABRT"),
        (signal.SIGKILL, ResourceError, "was killed .SIGKILL., most likely for memory"),
    ],
)
def test_a_dying_native_process_is_a_typed_error(
    stories_gguf: Path, tmp_path: Path, number: int, error: type[QuantizationError], message: str
) -> None:
    def strike(percent: int, stage: str, text: str) -> None:
        if "blk.2" in text:
            for child in psutil.Process().children():
                child.send_signal(number)

    with pytest.raises(error, match=message):
        quantize(stories_gguf, tmp_path / "out", "gguf", "IQ3_M", strike)
    assert _left_over(tmp_path / "out") == []


@pytest.mark.parametrize(("megabytes", "stage"), [(20, "converting"), (70, "writing")])
def test_a_file_size_limit_is_a_resource_error(
    stories15m: Path, tmp_path: Path, megabytes: int, stage: str
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The intermediate takes 61 MB; F32 again 61 MB, with llama.cpp's placeholder on top of a header.
    limit = megabytes << 20 if stage == "converting" else 61_000_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ResourceError, match="limit is reached"):
            quantize(stories15m, tmp_path / "out", "gguf", "Q8_0" if stage == "converting" else "F32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _left_over(tmp_path / "out") == []


def test_a_disk_too_small_is_refused_before_the_start(
    stories15m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 50_000_000})
    monkeypatch.setattr("qwodel.output.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="making stories15M-Q8_0.gguf needs about 0.08 GB"):
        quantize(stories15m, tmp_path / "out", "gguf", "Q8_0")


def test_an_existing_intermediate_is_not_replaced(stories15m: Path, tmp_path: Path) -> None:
    kept = tmp_path / "stories15M-F32.gguf"
    kept.write_bytes(b"mine")
    with pytest.raises(ValidationError, match="keep_intermediate would replace it"):
        quantize(stories15m, tmp_path, "gguf", "Q8_0", keep_intermediate=True)
    assert kept.read_bytes() == b"mine"
    assert _left_over(tmp_path) == [kept.name]


def _start(model: Path, out: Path) -> subprocess.Popen[str]:
    """Start a run that takes some seconds, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "qwodel",
        "quantize",
        str(model),
        "-b",
        "gguf",
        "-f",
        "IQ3_M",
        "-o",
        str(out),
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_leaves_nothing_the_next_does_not_clean(stories15m: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = _start(stories15m, out)
    assert process.stderr is not None
    for line in process.stderr:
        if "quantize:" in line and "tensor" in line:
            break
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.kill()
    process.wait()
    process.stderr.close()
    # The native child notices that its parent is gone.
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    assert not list(out.glob("*.gguf"))
    assert len(list(out.glob(".qwodel-*"))) == 1
    quantize(stories15m, out, "gguf", "Q8_0")
    assert _left_over(out) == ["stories15M-Q8_0.gguf", "stories15M-Q8_0.manifest.json"]


def test_a_polite_kill_cleans_up_at_once(stories15m: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = _start(stories15m, out)
    assert process.stderr is not None
    while "quantize:" not in process.stderr.readline():
        time.sleep(0.01)
    process.terminate()
    _, words = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; nothing was published" in words
    assert _left_over(out) == []


def test_a_worker_that_lies_dead_in_the_pipe_says_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "convert.py"
    script.write_text("import os, sys\nprint('about to die', flush=True)\nos._exit(7)\n")
    with pytest.raises(NativeFailure, match="ended with code 7; its last words: about to die"):
        run_worker("convert", {"script": str(script), "arguments": []})
