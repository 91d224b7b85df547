"""Inputs that once hung, crashed or passed in silence: what each should come to."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import save_file

from qwodel import quantize
from qwodel.backends.gguf.imatrix import ImatrixEntry, ImportanceMatrix, read_imatrix, write_imatrix
from qwodel.checkpoint.lora.merge import load_lora_for_merging
from qwodel.checkpoint.plan.layer_config import LayerConfig
from qwodel.checkpoint.rounding.statistics import StatisticsFile
from qwodel.exceptions import (
    CalibrationError,
    ConfigurationError,
    IntegrityError,
    QuantizationError,
    ValidationError,
)
from qwodel.segquant import load_calibrate_set
from qwodel.segquant.calibration_files import Meta, write_meta
from qwodel.smoothquant.calibration import load_activation_scales
from qwodel.source import inspect_source
from tests.hostile.mutations import rezipped


def test_a_model_whose_index_names_more_than_its_shards_hold_is_not_quantized(tmp_path: Path) -> None:
    model, shard = tmp_path / "m", "model-00001-of-00001.safetensors"
    model.mkdir()
    save_file({"model.layers.0.mlp.up_proj.weight": torch.randn(64, 64)}, model / shard)
    names = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, shard)})
    )
    for backend, name in (("int8", "int8_row"), ("fp8", "fp8_e4m3")):
        with pytest.raises(ValidationError, match=r"model\.norm\.weight.*no shard holds"):
            quantize(model, tmp_path / "o", backend, name)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("deep.safetensors", struct.pack("<Q", 100_000) + b"[" * 100_000, IntegrityError),
        ("inf.safetensors", struct.pack("<Q", 58) + b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,8]}}' + bytes(8), IntegrityError),
        ("m-00000-of-00000.gguf", b"GGUF", ValidationError),
        ("m-00003-of-00002.gguf", b"GGUF", ValidationError),
        ("empty.gguf", b"", ValidationError),
        ("empty.bin", b"", ValidationError),
        ("empty.safetensors", b"", ValidationError),
    ],
)  # fmt: skip
def test_headers_that_make_no_sense_are_typed(
    tmp_path: Path, name: str, content: bytes, error: type[QuantizationError]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error):
        inspect_source(tmp_path / name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_activation_scales_are_finite_and_not_negative(tmp_path: Path, value: float, suffix: str) -> None:
    path = tmp_path / f"scales{suffix}"
    scales = {"model.layers.0.q_proj": torch.tensor([1.0, value])}
    (torch.save if suffix == ".pt" else save_file)(scales, path)
    with pytest.raises(ValidationError, match=r"model\.layers\.0\.q_proj.*NaN, infinite or negative"):
        load_activation_scales(path)
    scales["model.layers.0.q_proj"][1] = 0
    (torch.save if suffix == ".pt" else save_file)(scales, path)
    assert load_activation_scales(path)["model.layers.0.q_proj"].tolist() == [1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("where", ["sums", "counts"])
def test_importance_is_finite_and_not_negative(tmp_path: Path, value: float, where: str) -> None:
    numbers = {"sums": np.ones((1, 4), np.float32), "counts": np.ones(1, np.float32)}
    write_imatrix(ImportanceMatrix({"w": ImatrixEntry(**numbers)}, ("a",), 1, 512), tmp_path / "i.gguf")
    assert read_imatrix(tmp_path / "i.gguf").entries["w"].sums.sum() == 4
    numbers[where].flat[0] = value
    write_imatrix(ImportanceMatrix({"w": ImatrixEntry(**numbers)}, ("a",), 1, 512), tmp_path / "bad.gguf")
    with pytest.raises(CalibrationError, match="negative or not finite"):
        read_imatrix(tmp_path / "bad.gguf")


def test_statistics_are_finite(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    described = {"version": 1, "entries": {"q": {"layers": ["q"], "count": 5}}}
    for peak in (1.0, -1.0, float("nan")):
        tensors = {"q.mean": torch.zeros(2), "q.channel_max": torch.full((2,), peak)}
        save_file(tensors, path, {"qwodel_statistics": json.dumps(described)})
        with StatisticsFile(path) as file:
            if peak > 0:
                assert file.read("q") is not None
                continue
            with pytest.raises(
                CalibrationError, match=r"q\.channel_max holds numbers that no activations have"
            ):
                file.read("q")


@pytest.mark.parametrize(
    "tensors",
    [
        {"a.lora_down.weight": torch.ones(4), "a.lora_up.weight": torch.ones(4)},
        {"a.lora_down.weight": torch.ones(4, 4), "a.lora_up.weight": torch.ones(())},
        {"a.lora_down.weight": torch.ones(0, 4), "a.lora_up.weight": torch.ones(4, 0)},
    ],
    ids=["one-dimensional", "a number", "rank 0"],
)
def test_halves_of_a_lora_are_matrices(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValidationError, match="two halves are matrices"):
        load_lora_for_merging(tmp_path / "lora.safetensors")


def test_an_adapters_expressions_take_no_time(tmp_path: Path) -> None:
    name = "base_model.model." + "a" * 60 + "b"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"lora_alpha": 4, "alpha_pattern": {"(a+)+": 7, "(a*)*b": 3}})
    )
    start = time.process_time()
    assert [layer["alpha"] for layer in load_lora_for_merging(tmp_path).values()] == [3]
    assert time.process_time() - start < 5


def test_layer_rules_take_no_time_and_say_what_they_cannot_do() -> None:
    rules = LayerConfig.from_mapping(
        {"layer_patterns": {"(a+)+$": {"skip": True}, "(b|b)*c": {"skip": True}}}
    )
    start = time.process_time()
    assert rules.rule_for("a" * 1000 + "!") is None
    found = rules.rule_for("b" * 1000 + "c", fullmatch=True)
    assert found is not None
    assert found[0] == "(b|b)*c"
    assert time.process_time() - start < 5
    with pytest.raises(ConfigurationError, match="could take too long"):
        LayerConfig.from_mapping({"layer_patterns": {r"(a+)+\1$": {"skip": True}}})


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x02}N" + b"\x85" * 3_000_000 + b"Ns.",
        b"\x80\x02}N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"Ns.",
    ],
    ids=["nested", "shared"],
)
@pytest.mark.timeout(120)
def test_keys_that_kill_torchs_own_unpickler_do_not_reach_it(tmp_path: Path, stream: bytes) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    bomb = rezipped(buffer.getvalue(), {"/data.pkl": stream})
    (tmp_path / "scales.pt").write_bytes(bomb)
    with pytest.raises(ValidationError, match="dictionary key of type tuple"):
        load_activation_scales(tmp_path / "scales.pt")
    digest = hashlib.sha256(bomb).hexdigest()
    meta = Meta({}, compress=False, chunk_size=1, chunk_lens=[1], sha256=[digest], complete=True)
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "chunk_000.pt").write_bytes(bomb)
    write_meta(folder, meta)
    found = load_calibrate_set(folder, compress=False)
    assert found is not None
    with pytest.raises(ValidationError, match="dictionary key of type tuple"):
        found[0]


def test_a_small_chunk_does_not_become_a_large_one(tmp_path: Path) -> None:
    bomb = zstandard.compress(bytes(1 << 28))
    digest = hashlib.sha256(bomb).hexdigest()
    write_meta(
        tmp_path, Meta({}, compress=True, chunk_size=1, chunk_lens=[1], sha256=[digest], complete=True)
    )
    (tmp_path / "chunk_000.pt.zst").write_bytes(bomb)
    found = load_calibrate_set(tmp_path)
    assert found is not None
    with pytest.raises(IntegrityError, match="compressed bytes would become 268,435,456"):
        found[0]
