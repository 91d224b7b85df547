"""Pipes, sockets, devices, loops and names that are no names, given to every function that takes a path."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qwodel import Quantizer, quantize
from qwodel.backends.gguf.imatrix import read_imatrix
from qwodel.calibration.texts import load_texts
from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.lora.merge import load_lora_for_merging
from qwodel.checkpoint.plan.layer_config import load_layer_config
from qwodel.checkpoint.rounding.statistics import StatisticsFile
from qwodel.checkpoint.source.weights import read_weights
from qwodel.exceptions import QuantizationError
from qwodel.gguf_header import read_gguf_header
from qwodel.int8 import convert_to_int8
from qwodel.safetensors_files import read_header
from qwodel.segquant import load_affiner, load_calibrate_set, load_quantized
from qwodel.smoothquant.calibration import load_activation_scales
from qwodel.source import inspect_source
from qwodel.torch_pickle import read_pickled_tensors

READERS: dict[str, Callable[[Any], Any]] = {
    "Quantizer": lambda path: Quantizer("int8", path),
    "quantize": lambda path: quantize(path, "out", "int8", "int8_row"),
    "inspect_source": inspect_source,
    "read_header": read_header,
    "read_gguf_header": read_gguf_header,
    "read_pickled_tensors": read_pickled_tensors,
    "UnifiedSafetensorsLoader": UnifiedSafetensorsLoader,
    "read_weights": lambda path: list(read_weights(path)),
    "load_texts": lambda path: list(load_texts(path)),
    "load_layer_config": load_layer_config,
    "load_lora_for_merging": load_lora_for_merging,
    "read_imatrix": lambda path: read_imatrix(Path(path)),
    "StatisticsFile": StatisticsFile,
    "load_activation_scales": load_activation_scales,
    "load_quantized": lambda path: load_quantized(path, torch.nn.Linear(2, 2)),
    "load_affiner": load_affiner,
    "convert_to_int8": lambda path: convert_to_int8(path, "out.safetensors", True, {}, 1, 0),
}


@pytest.fixture
def special(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    paths = [
        "/dev/null",
        "/dev/zero",
        "./" + "x" * 300,
        "./" + "y/" * 4000,
        "~nosuchuser/model",
        "./a\0b",
        "./a\ud800",
    ]
    for suffix in ("", ".safetensors", ".gguf", ".bin", ".pt", ".json", ".jsonl", ".txt", ".parquet"):
        os.mkfifo(f"pipe{suffix}")
        Path(f"loop{suffix}").symlink_to(f"loop{suffix}")
        paths += [f"./pipe{suffix}", f"./loop{suffix}"]
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("./socket.json")
        yield [*paths, "./socket.json"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("read", READERS.values(), ids=list(READERS))
def test_what_is_no_file_is_a_typed_error_and_never_waited_for(
    read: Callable[[Any], Any], special: list[str]
) -> None:
    for path in special:
        with pytest.raises(QuantizationError):
            read(path)


@pytest.mark.timeout(120)
def test_special_files_inside_a_folder(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    os.mkfifo(model / "config.json")
    (model / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(QuantizationError, match=r"config\.json is a pipe"):
        inspect_source(model)
    (model / "config.json").unlink()
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(QuantizationError, match="is a device"):
        inspect_source(model)
    (model / "model.safetensors").unlink()
    texts = tmp_path / "texts"
    texts.mkdir()
    os.mkfifo(texts / "a.txt")
    with pytest.raises(QuantizationError, match=r"a\.txt is a pipe"):
        list(load_texts(texts))
    (tmp_path / "set").mkdir()
    os.mkfifo(tmp_path / "set" / "meta.json")
    with pytest.raises(QuantizationError, match=r"meta\.json is a pipe"):
        load_calibrate_set(tmp_path / "set")
