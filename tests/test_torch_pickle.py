from __future__ import annotations

import os
import pickle
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from qwodel.exceptions import IntegrityError, ValidationError
from qwodel.torch_pickle import read_pickled_tensors


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_descriptions_agree_with_torch(tmp_path: Path, as_zip: bool) -> None:
    shared = torch.randn(6, 4, dtype=torch.bfloat16)
    state = {
        "embed": shared,
        "head": shared,
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "half": torch.ones(2, 3, dtype=torch.float16),
        "nested": {"ids": torch.arange(5), "step": 3},
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
    }
    path = tmp_path / "model.pt"
    torch.save(state, path, _use_new_zipfile_serialization=as_zip)
    found = read_pickled_tensors(path)
    expected = torch.load(path, weights_only=True)
    flat = {**{k: v for k, v in expected.items() if k != "nested"}, "nested.ids": expected["nested"]["ids"]}
    assert {name: tensor.shape for name, tensor in found.items()} == {
        n: tuple(t.shape) for n, t in flat.items()
    }
    assert {n: t.dtype for n, t in found.items()} == {
        "embed": "BF16", "head": "BF16", "parameter": "F32", "half": "F16", "nested.ids": "I64", "scalar": "F32", "empty": "F32",
    }  # fmt: skip
    assert found["embed"].storage == found["head"].storage != found["half"].storage


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path: Path, as_zip: bool) -> None:
    path, marker = tmp_path / "evil.bin", tmp_path / "ran"
    torch.save({"w": torch.ones(1), "bomb": _Bomb(marker)}, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(ValidationError, match=r"asks for (posix|os|nt)\.mkdir"):
        read_pickled_tensors(path)
    assert not marker.exists()


def test_whole_modules_plain_pickles_and_other_files_are_refused(tmp_path: Path) -> None:
    module = tmp_path / "module.pt"
    torch.save(torch.nn.Linear(2, 2), module)
    with pytest.raises(ValidationError, match="asks for torch.nn"):
        read_pickled_tensors(module)
    plain = tmp_path / "plain.bin"
    plain.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValidationError, match="not one torch.save wrote"):
        read_pickled_tensors(plain)
    text = tmp_path / "text.bin"
    text.write_text("hello")
    with pytest.raises(ValidationError, match="neither a zip archive nor a pickle"):
        read_pickled_tensors(text)
    with pytest.raises(ValidationError, match="does not exist"):
        read_pickled_tensors(tmp_path / "none.pt")


def test_truncated_legacy_files_are_integrity_errors(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"w": torch.ones(100)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(IntegrityError, match="truncated torch checkpoint"):
        read_pickled_tensors(path)


def _archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
    return path


_SHARED = b"\x80\x02}q\0" + b"".join(
    b"}(X\1\0\0\0ah%cX\1\0\0\0bh%cuq%c" % (i, i, i + 1) for i in range(30)
) + b"."  # fmt: skip


@pytest.mark.parametrize(
    ("pickled", "error", "said"),
    [
        (_SHARED, ValidationError, "without end"),
        (b"\x80\x02}q\0X\1\0\0\0ah\0s.", ValidationError, "without end"),
        (b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns.", ValidationError, "dictionary key of type tuple"),
        (b"\x80\x02}q\0r\xff\xff\xff\xffX\1\0\0\0ah\1s.", IntegrityError, "damaged"),
        (b"\x80\x02B\xff\xff\xff\xffabc.", IntegrityError, "truncated"),
        (b"\x80\x05\x96\xff\xff\xff\xff\0\0\0\0abc.", ValidationError, "opcode 0x96"),
        (b"\x80\x02X\2\0\0\0\xff\xfe.", IntegrityError, "damaged"),
        (b"\x80\x02Iabc\n.", IntegrityError, "is no number"),
        (b"\x80\x02" + b"(" * 100, IntegrityError, "truncated"),
        (b"\x80\x02K\1K\1\x85R.", ValidationError, "calls what is no function"),
    ],
    ids=[
        "shared",
        "cyclic",
        "nested key",
        "memo index",
        "length",
        "buffer",
        "utf-8",
        "number",
        "truncated",
        "call",
    ],
)
def test_bombs_are_refused_in_no_time_and_memory(
    tmp_path: Path, pickled: bytes, error: type[Exception], said: str
) -> None:
    path = _archive(tmp_path / "model.bin", pickled)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(error, match=said):
        read_pickled_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - start < 10
    assert peak < 1_000_000 + 100 * len(pickled)


@pytest.mark.parametrize("packing", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_pickle_larger_than_its_archive_is_not_unpacked(tmp_path: Path, packing: int) -> None:
    path = _archive(tmp_path / "model.bin", bytes(1 << 24), packing)
    with pytest.raises(ValidationError, match="is compressed"):
        read_pickled_tensors(path)


def test_a_tensor_beyond_its_storage_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"w": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    # The shape (4,) is BININT1 4, TUPLE1.
    assert pickled.count(b"K\x04\x85") == 1
    with pytest.raises(IntegrityError, match=r"shape \[9\] in a storage of 4"):
        read_pickled_tensors(_archive(path, pickled.replace(b"K\x04\x85", b"K\x09\x85")))
