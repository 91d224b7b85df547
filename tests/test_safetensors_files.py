from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.exceptions import IntegrityError, ValidationError
from qwodel.safetensors_files import checkpoint_files, read_header, read_index
from qwodel.source import inspect_source

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16,
    torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
]  # fmt: skip
SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


def _write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


@given(tensors=st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=6))
def test_header_agrees_with_the_reference_library(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    path = tmp_path_factory.mktemp("st") / "model.safetensors"
    save_file(
        {f"t{i}": torch.zeros(shape, dtype=kind) for i, (kind, shape) in enumerate(tensors)},
        path,
        {"format": "pt"},
    )
    header = read_header(path)
    data = path.read_bytes()
    with safe_open(path, "pt") as reference:
        assert set(reference.keys()) == set(header.tensors)
        assert reference.metadata() == header.metadata
        for name, entry in header.tensors.items():
            assert list(entry.shape) == reference.get_slice(name).get_shape()
            assert entry.dtype == reference.get_slice(name).get_dtype()
            assert entry.nbytes == reference.get_tensor(name).nbytes
    assert max((entry.end for entry in header), default=len(data)) == len(data)


def test_truncation_names_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(64, 64)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(
        IntegrityError, match=rf"truncated: it has {len(whole) - 100:,} of {len(whole):,} bytes"
    ):
        read_header(path)
    path.write_bytes(whole[:40])
    with pytest.raises(IntegrityError, match="truncated"):
        read_header(path)
    path.write_bytes(whole + b"xx")
    with pytest.raises(IntegrityError, match="2 bytes after its last tensor"):
        read_header(path)


@pytest.mark.parametrize(
    ("offsets", "shape"),
    [([0, 8], [3]), ([4, 8], [1]), ([0, 4], [2]), ([-4, 0], [1])],
    ids=["too long", "gap", "too short", "before the data"],
)
def test_offsets_that_disagree_are_refused(tmp_path: Path, offsets: list[int], shape: list[int]) -> None:
    header = {"w": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
    with pytest.raises(IntegrityError, match="'w' covers bytes"):
        read_header(_write(tmp_path / "x.safetensors", header, bytes(8)))


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    with pytest.raises(IntegrityError, match="covers bytes"):
        read_header(_write(tmp_path / "x.safetensors", {"a": entry, "b": entry}, bytes(8)))


@pytest.mark.parametrize("header", [b"{not json", b"[1, 2]", b'{"w": 3}', b'{"w": {"dtype": "F32"}}'])
def test_damaged_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(IntegrityError, match="damaged"):
        read_header(_write(tmp_path / "x.safetensors", header))


def test_what_is_not_safetensors_says_so(tmp_path: Path) -> None:
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValidationError, match="not a safetensors file") as caught:
        read_header(pointer)
    assert "LFS" in (caught.value.hint or "")
    with pytest.raises(ValidationError, match="does not exist"):
        read_header(tmp_path / "none.safetensors")
    unknown = {"w": {"dtype": "Q3", "shape": [1], "data_offsets": [0, 1]}}
    with pytest.raises(ValidationError, match="unknown dtype Q3"):
        read_header(_write(tmp_path / "x.safetensors", unknown, b"1"))


@pytest.mark.parametrize(
    "shard", ["../evil.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\evil", ""]
)
def test_an_index_may_not_leave_its_folder(tmp_path: Path, shard: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(ValidationError, match="outside its folder"):
        read_index(index)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValidationError, match="lacks 1 of 2 shards.*00002-of-00002"):
        checkpoint_files(tmp_path)


def test_shards_are_found_without_an_index_and_duplicates_left_out(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors", "consolidated.00.safetensors"):
        save_file({name[0]: torch.ones(1)}, tmp_path / name)
    assert [file.name for file in checkpoint_files(tmp_path)] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}, "the dimension '2'"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "the dimension 2.0"),
        ({"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}, "the dimension True"),
        ({"dtype": "F32", "shape": [1 << 64], "data_offsets": [0, 8]}, "the dimension"),
        ({"dtype": "F32", "shape": [1 << 62] * 100_000, "data_offsets": [0, 8]}, "100000 dimensions"),
        ({"dtype": "F32", "shape": [2], "data_offsets": ["0", 8.5]}, "the offsets"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, "no dtype, shape and pair"),
        ({"dtype": 3, "shape": [2], "data_offsets": [0, 8]}, "no dtype, shape and pair"),
        ([1], "described by no object"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path: Path, spec: object, said: str) -> None:
    with pytest.raises(IntegrityError, match=said):
        read_header(_write(tmp_path / "x.safetensors", {"w": spec}, bytes(8)))


def test_names_that_occur_twice_and_other_metadata_are_refused(tmp_path: Path) -> None:
    spec = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    twice = b'{"w":' + spec + b',"w":' + spec.replace(b"F32", b"I32") + b"}"
    with pytest.raises(IntegrityError, match="'w' is there twice"):
        read_header(_write(tmp_path / "x.safetensors", twice, bytes(8)))
    for metadata in ("hello", [1], {"x": {"y": 1}}):
        header = {"__metadata__": metadata, "w": json.loads(spec)}
        with pytest.raises(IntegrityError, match="does not map strings to strings"):
            read_header(_write(tmp_path / "x.safetensors", header, bytes(8)))
    with pytest.raises(IntegrityError, match="characters"):
        read_header(_write(tmp_path / "x.safetensors", {"w" * 5000: json.loads(spec)}, bytes(8)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: index | {"ghost": "1.safetensors"}, r"names 1 tensor \('ghost'\) that no shard holds"),
        (lambda index: {"a": index["a"]}, r"omits 1 tensor \('b'\) that its shards hold"),
        (lambda index: {"a": index["b"], "b": index["a"]}, "places 2 tensors .* in another shard"),
    ],
    ids=["named", "omitted", "moved"],
)
def test_an_index_that_says_otherwise_than_the_headers_is_refused_before_work(
    change: Callable[[dict[str, str]], dict[str, str]], said: str, tmp_path: Path
) -> None:
    index = {"a": "1.safetensors", "b": "2.safetensors"}
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "2.safetensors")
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": index}))
    assert inspect_source(tmp_path).parameters == 4
    changed = change(index)
    if "omits" in said:
        save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "1.safetensors")
    file.write_text(json.dumps({"weight_map": changed}))
    for read in (inspect_source, UnifiedSafetensorsLoader):
        with pytest.raises(ValidationError, match=said):
            read(tmp_path)
