"""Runs in threads of one process: the bytes of runs in a row, and nothing of the user's process changed."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qwodel import quantize
from tests.modeling.tiny_models import make
from tests.smoothquant.conftest import save_tokenizer, text, with_outliers

__all__ = ["text"]  # a fixture

RUNS = (
    ("int8", "int8_row", torch.float32, {}),
    ("int8", "int8_row", torch.bfloat16, {}),
    ("fp8", "fp8_e4m3", torch.float32, {}),
    ("smoothquant", "w8a8_dynamic", torch.float32, {}),
    ("smoothquant", "w8a8_static", torch.bfloat16, {"optimizer": "gptq"}),
    ("int8", "int8_row", torch.float32, {"optimizer": "adamw", "num_iter": 5}),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        found[dtype] = tmp_path_factory.mktemp("models") / "llama"
        with_outliers(make("llama-tied")).to(dtype).save_pretrained(found[dtype])
        save_tokenizer(found[dtype])
    return found


def run(number: int, models: dict[torch.dtype, Path], text: Path, folder: Path) -> str:
    """SHA-256 of all a run publishes but its manifest, which tells the time it took."""
    backend, kind, dtype, options = RUNS[number]
    path = quantize(
        models[dtype], folder / str(number), backend, kind,
        calibration_dataset=str(text), num_samples=8, seq_length=32, batch_size=4, **options,
    )  # fmt: skip
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if "manifest" not in file.name:
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def process_state() -> dict[str, Any]:
    threads: list[int] = []
    fresh = threading.Thread(target=lambda: threads.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    return {
        "register_parameter": nn.Module.register_parameter,
        "init": nn.init.kaiming_uniform_,
        "linspace": torch.linspace,
        "default dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), threads[0]),
        "precision": torch.backends.mkldnn.matmul.fp32_precision,
        "environment": dict(os.environ),
        "filters": list(warnings.filters),
        "alive": sorted(each.name for each in threading.enumerate()),
    }


@contextmanager
def building() -> Iterator[list[tuple[str, torch.dtype]]]:
    """A thread of the user's that builds layers meanwhile; yields what is wrong with them."""
    wrong: list[tuple[str, torch.dtype]] = []
    stop = threading.Event()

    def build() -> None:
        while not stop.wait(0.001):
            layer = nn.Linear(4, 4)
            if layer.weight.device.type != "cpu" or layer.weight.dtype != torch.float32:
                wrong.append((layer.weight.device.type, layer.weight.dtype))

    thread = threading.Thread(target=build)
    thread.start()
    try:
        yield wrong
    finally:
        stop.set()
        thread.join()


def test_threads_make_the_bytes_of_runs_in_a_row(
    models: dict[torch.dtype, Path], text: Path, tmp_path: Path
) -> None:
    drawn = torch.get_rng_state()
    expected = [run(number, models, text, tmp_path / "row") for number in range(len(RUNS))]
    assert torch.equal(torch.get_rng_state(), drawn), "the user's generator was drawn from"
    before = process_state()
    found: dict[int, str | BaseException] = {}

    def work(number: int) -> None:
        try:
            found[number] = run(number, models, text, tmp_path / "threads")
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(RUNS))]
    with building() as wrong:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[number] for number in range(len(RUNS))] == expected
    assert wrong == []
    after = process_state()
    assert {name: value for name, value in after.items() if value != before[name]} == {}
    assert nn.Linear(2, 2).weight.device.type == "cpu"


@pytest.mark.parametrize(
    ("backend", "kind", "options"),
    [
        ("int8", "int8_row", {}),
        ("int8", "int8_tensor", {}),
        ("int8", "int8_row", {"optimizer": "adamw", "num_iter": 5}),
        ("fp8", "fp8_e4m3", {"optimizer": "search"}),
    ],
)
def test_bytes_do_not_depend_on_the_default_dtype(
    backend: str, kind: str, options: dict[str, Any], models: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    """Which transformers changes for all threads while any of them loads a bf16 model."""
    expected = quantize(models[torch.float32], tmp_path / "a", backend, kind, layout="comfyui", **options)
    for dtype in (torch.bfloat16, torch.float64):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            found = quantize(
                models[torch.float32], tmp_path / str(dtype), backend, kind, layout="comfyui", **options
            )
        finally:
            torch.set_default_dtype(before)
        assert found.read_bytes() == expected.read_bytes()
