from __future__ import annotations

import os
import pickle
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
