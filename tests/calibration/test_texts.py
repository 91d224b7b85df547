from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from qwodel.calibration import describe_dataset, load_texts
from qwodel.exceptions import CalibrationError


def test_every_local_form_gives_its_documents(tmp_path: Path) -> None:
    records = [{"text": "one"}, {"text": "  "}, {"text": "two"}]
    (tmp_path / "a.txt").write_text("plain text\n")
    (tmp_path / "b.json").write_text(json.dumps(records))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    parquet.write_table(pyarrow.table({"id": [1, 2], "content": ["x", "y"]}), tmp_path / "d.parquet")
    assert list(load_texts(tmp_path / "a.txt")) == ["plain text\n"]
    assert list(load_texts(tmp_path / "b.json")) == ["one", "two"]
    assert list(load_texts(str(tmp_path / "c.jsonl"))) == ["one", "two"]
    assert list(load_texts(tmp_path / "d.parquet")) == ["x", "y"]
    assert list(load_texts(tmp_path)) == ["plain text\n", "one", "two", "one", "two", "x", "y"]
    assert list(load_texts(iter(["in", "", "memory"]))) == ["in", "memory"]


def test_columns_are_found_named_or_chat(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"story": "found", "note": "named"}]))
    assert list(load_texts(path)) == ["found"]
    assert list(load_texts(path, column="note")) == ["named"]
    path.write_text(
        json.dumps(
            [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
        )
    )
    assert list(load_texts(path)) == ["hi\nho"]
    path.write_text(json.dumps(["bare", "strings"]))
    assert list(load_texts(path)) == ["bare", "strings"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "{broken", "is not readable JSON"),
        ("x.jsonl", '{"text": "ok"}\n{broken', "line 2 is not readable JSON"),
        ("x.json", '[{"label": 3}]', "has no text column"),
        ("x.json", '[{"text": 3}]', "is int, not a string"),
        ("x.txt", "   \n", "holds no text"),
        ("x.csv", "a,b", "no calibration file this library knows"),
        ("x.txt", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CalibrationError, match=message):
        list(load_texts(path))


def test_missing_sets_name_the_local_alternative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match="does not exist"):
        load_texts(str(tmp_path / "none.txt"))
    with pytest.raises(CalibrationError, match="holds no calibration files"):
        load_texts(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CalibrationError, match="owner/none:sub cannot be read from the hub") as caught:
        load_texts("owner/none:sub", token="hf_secret")
    assert "local .txt" in (caught.value.hint or "")
    assert "hf_secret" not in str(caught.value)
    with pytest.raises(CalibrationError, match="must be strings; found int"):
        load_texts([1, 2])  # type: ignore[list-item]


def test_descriptions_reveal_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text("x")
    assert describe_dataset(file) == "x.txt"
    assert describe_dataset("repo:subset") == "repo:subset"
    assert describe_dataset(["a"]) == "texts given in Python"
