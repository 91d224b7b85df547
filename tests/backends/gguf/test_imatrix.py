from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from qwodel.backends.gguf.imatrix import ImatrixEntry, ImportanceMatrix, read_imatrix, write_imatrix
from qwodel.exceptions import CalibrationError


def _entry(sums: list[list[float]], counts: list[float]) -> ImatrixEntry:
    return ImatrixEntry(np.array(sums, np.float32), np.array(counts, np.float32))


MATRIX = ImportanceMatrix(
    {
        "blk.0.attn_q.weight": _entry([[2.0, 4.0, 8.0]], [4]),
        "blk.0.ffn_up_exps.weight": _entry([[3.0, 6.0], [0.0, 0.0]], [3, 0]),
    },
    ("text.txt",),
    7,
    512,
)


def test_weights_are_means_and_ones_where_an_expert_saw_nothing() -> None:
    weights = MATRIX.weights()
    assert weights["blk.0.attn_q.weight"].tolist() == [0.5, 1.0, 2.0]
    assert weights["blk.0.ffn_up_exps.weight"].tolist() == [1.0, 2.0, 1.0, 1.0]
    assert MATRIX.partial() == {"blk.0.ffn_up_exps.weight": 0.5}


def test_the_gguf_form_is_llama_cpps(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_imatrix(MATRIX, path)
    reader = GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["text.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 7
    assert reader.fields["imatrix.chunk_size"].contents() == 512
    assert "general.architecture" not in reader.fields
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors["blk.0.ffn_up_exps.weight.in_sum2"].shape) == [2, 2]
    assert list(tensors["blk.0.ffn_up_exps.weight.counts"].shape) == [1, 2]
    back = read_imatrix(path)
    assert back == ImportanceMatrix(back.entries, ("text.txt",), 7, 512)
    for name, entry in MATRIX.entries.items():
        np.testing.assert_array_equal(back.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(back.entries[name].counts, entry.counts)


def _legacy(path: Path, *, tail: bool = True, cut: int | None = None) -> Path:
    """Write the older form by hand: name, calls, values = mean · calls."""
    name, values = b"blk.0.attn_q.weight", np.array([1.5, 3.0, 6.0], np.float32)
    raw = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 3, values.size) + values.tobytes()
    if tail:
        raw += struct.pack("<ii", 9, 8) + b"text.txt"
    path.write_bytes(raw[:cut])
    return path


@pytest.mark.parametrize("tail", [True, False])
def test_the_legacy_form_is_read(tmp_path: Path, tail: bool) -> None:
    matrix = read_imatrix(_legacy(tmp_path / "m.dat", tail=tail))
    assert matrix.weights()["blk.0.attn_q.weight"].tolist() == [0.5, 1.0, 2.0]
    assert matrix.legacy
    assert (matrix.datasets, matrix.chunk_count) == ((("text.txt",), 9) if tail else ((), 0))


def test_what_is_no_matrix_says_so(tmp_path: Path, smollm2_gguf: Path) -> None:
    with pytest.raises(CalibrationError, match="does not exist"):
        read_imatrix(tmp_path / "none")
    with pytest.raises(CalibrationError, match=r"without imatrix\.datasets"):
        read_imatrix(smollm2_gguf)
    with pytest.raises(CalibrationError, match="not a readable importance matrix"):
        read_imatrix(_legacy(tmp_path / "cut.dat", cut=40))
    (tmp_path / "text").write_text("hello, this is no matrix at all")
    with pytest.raises(CalibrationError, match=r"neither of llama\.cpp's formats"):
        read_imatrix(tmp_path / "text")
    bad = ImportanceMatrix({"blk.0.attn_q.weight": _entry([[np.nan]], [1])}, ("x",), 1, 1)
    write_imatrix(bad, tmp_path / "nan.gguf")
    with pytest.raises(CalibrationError, match="not finite"):
        read_imatrix(tmp_path / "nan.gguf")
