from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwodel.checkpoint.files.dtypes import TORCH_DTYPES
from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.exceptions import IntegrityError, ValidationError
from tests.checkpoint.checkpoints import llama_weights, save_sharded


def write_raw(path: Path, name: str, dtype: str, shape: list[int], data: bytes) -> None:
    header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
def test_every_dtype_reads_as_its_own_bits(tmp_path: Path, dtype: str, low_memory: bool) -> None:
    itemsize = TORCH_DTYPES[dtype].itemsize
    shape = [3, 8] if dtype == "F4" else [3, 4]
    data = bytes(i % 2 if dtype == "BOOL" else (i * 37) % 256 for i in range(12 * itemsize))
    write_raw(tmp_path / "m.safetensors", "x", dtype, shape, data)
    with UnifiedSafetensorsLoader(tmp_path / "m.safetensors", low_memory) as loader:
        tensor = loader.get_tensor("x")
        assert tensor.dtype == TORCH_DTYPES[dtype]
        assert bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) == data
        rows = loader.get_rows("x", 1, 3)
        assert bytes(rows.contiguous().view(-1).view(torch.uint8).tolist()) == data[4 * itemsize :]


def test_dtypes_torch_lacks_can_be_copied_but_not_read_as_values(tmp_path: Path) -> None:
    write_raw(tmp_path / "m.safetensors", "x", "F6_E2M3", [4], b"abc")
    with UnifiedSafetensorsLoader(tmp_path / "m.safetensors") as loader:
        assert bytes(loader.read_bytes("x").tolist()) == b"abc"
        with pytest.raises(ValidationError, match="F6_E2M3"):
            loader.get_tensor("x")


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("index", [False, True])
def test_shards_are_one_checkpoint(tmp_path: Path, low_memory: bool, index: bool) -> None:
    weights = llama_weights()
    save_sharded(tmp_path, weights, 3, index=index)
    with UnifiedSafetensorsLoader(tmp_path, low_memory=low_memory) as loader:
        assert sorted(loader.keys()) == sorted(weights)
        assert loader.metadata() == {"format": "pt"}
        for name, weight in weights.items():
            assert loader.get_shape(name) == tuple(weight.shape)
            assert loader.get_ndim(name) == weight.ndim
            assert torch.equal(loader.get_tensor(name), weight)
            loader.mark_processed(name)
            assert torch.equal(loader.get_tensor(name), weight)


def test_tensors_outlive_the_loader(tmp_path: Path) -> None:
    weights = llama_weights(1)
    save_file(weights, tmp_path / "m.safetensors")
    with UnifiedSafetensorsLoader(tmp_path / "m.safetensors") as loader:
        kept = {name: loader.get_tensor(name) for name in loader}
    assert all(torch.equal(kept[name], weights[name]) for name in weights)


def test_changing_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4096)}, tmp_path / "m.safetensors")
    with UnifiedSafetensorsLoader(tmp_path / "m.safetensors") as loader:
        loader.get_tensor("x").zero_()
    assert torch.equal(load_file(tmp_path / "m.safetensors")["x"], torch.ones(4096))


def test_truncated_file_is_an_integrity_error(tmp_path: Path) -> None:
    save_file(llama_weights(1), tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(data[:-100])
    with pytest.raises(IntegrityError, match="truncated"):
        UnifiedSafetensorsLoader(tmp_path / "m.safetensors")


def test_file_that_shrinks_while_open_is_noticed(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4096)}, tmp_path / "m.safetensors")
    with UnifiedSafetensorsLoader(tmp_path / "m.safetensors", low_memory=True) as loader:
        with (tmp_path / "m.safetensors").open("r+b") as file:
            file.truncate(200)
        with pytest.raises(IntegrityError, match="'x'"):
            loader.get_tensor("x")


@pytest.mark.parametrize("shard", ["../out.safetensors", "/etc/passwd", "a/../../b.safetensors"])
def test_index_that_leaves_its_folder_is_refused(tmp_path: Path, shard: str) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "m.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ValidationError, match="outside its folder"):
        UnifiedSafetensorsLoader(tmp_path)


def test_the_same_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValidationError, match=r"both a\.safetensors and b\.safetensors"):
        UnifiedSafetensorsLoader(tmp_path)


@pytest.mark.parametrize("make", ["missing", "empty"])
def test_nothing_to_read_is_a_validation_error(tmp_path: Path, make: str) -> None:
    with pytest.raises(ValidationError):
        UnifiedSafetensorsLoader(tmp_path / "nowhere" if make == "missing" else tmp_path)


READ_ALL = """
import sys
from pathlib import Path
from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
with UnifiedSafetensorsLoader(sys.argv[1], low_memory=True) as loader:
    for index, key in enumerate(loader.keys()):
        if index == 4:  # by now torch has made its threads and loaded its code
            before = peak()
        loader.get_tensor(key).float()
        loader.mark_processed(key)
print((peak() - before) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs procfs")
def test_low_memory_follows_the_largest_tensor_not_the_file(tmp_path: Path) -> None:
    save_file(
        {f"w{i}": torch.zeros(1024, 4096, dtype=torch.bfloat16) for i in range(40)},
        tmp_path / "m.safetensors",
    )
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path / "m.safetensors")],
        check=True,
        capture_output=True,
        text=True,
    )
    # 288 MB are still to be read then; a tensor has 8, and 16 in float32, and freed pages go back late.
    assert int(done.stdout) < 96
