from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qwodel import hashes
from qwodel.exceptions import IntegrityError, ResourceError
from qwodel.hashes import FileHashes, OutputHashes, SourceFiles, check_outputs, describes, hash_outputs


def test_hashes_are_sha256(tmp_path: Path) -> None:
    files = []
    for index, size in enumerate((0, 1, 5 << 20)):
        files.append(tmp_path / f"{index}.bin")
        files[-1].write_bytes(os.urandom(size))
    expected = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert FileHashes(files).result() == expected
    with pytest.raises(FileNotFoundError):
        FileHashes([tmp_path / "none"]).result()


def _rewrite(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.write(b"changed")


def _replace(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    stat = file.stat()
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(file)


def _append(file: Path) -> None:
    stat = file.stat()
    with file.open("ab") as stream:
        stream.write(b"more")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [_rewrite, _replace, _append, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_source_that_changes_is_noticed(tmp_path: Path, name: str, change: Callable[[Path], None]) -> None:
    for each in ("model.safetensors", "config.json"):
        (tmp_path / each).write_bytes(b"some bytes")
    with SourceFiles([tmp_path / "model.safetensors"], [tmp_path / "config.json"]) as files:
        files.check()
        change(tmp_path / name)
        with pytest.raises(IntegrityError, match=rf"{name} (changed|disappeared) while") as caught:
            files.settled()
    assert caught.value.hint


def test_a_link_that_is_turned_to_another_file_is_noticed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"the same")
    link = tmp_path / "model.safetensors"
    link.symlink_to("one")
    with SourceFiles([link]) as files:
        link.unlink()
        link.symlink_to("two")
        with pytest.raises(IntegrityError, match="changed while"):
            files.settled()


def test_permissions_and_hard_links_are_no_change(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    with SourceFiles([file]) as files:
        file.chmod(0o600)
        os.link(file, tmp_path / "another")
        assert files.settled() == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}


def test_outputs_are_held_against_their_hashes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        (folder / name).write_bytes(name.encode())
    outputs = hash_outputs(folder)
    assert outputs["sub/c"] == {"bytes": 5, "sha256": hashlib.sha256(b"sub/c").hexdigest()}
    assert check_outputs(folder, outputs) == []
    (folder / "a").write_bytes(b"x")
    (folder / "b").write_bytes(b"longer")
    (folder / "sub" / "c").unlink()
    assert check_outputs(folder, outputs) == [
        "a has other bytes than the manifest says",
        "b has 6 bytes, the manifest says 1",
        "sub/c is missing",
    ]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"outputs": {"m": 1}}', '{"outputs": {"m": {"bytes": "1"}}}']
)
def test_what_is_no_manifest_describes_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "m").write_bytes(b"x")
    (tmp_path / "m.manifest.json").write_text(text)
    assert not describes(tmp_path / "m.manifest.json", tmp_path / "m")


def test_what_changes_after_it_was_hashed_is_hashed_again(tmp_path: Path) -> None:
    for name in ("kept", "changed"):
        (tmp_path / name).write_bytes(name.encode())
    hashes = OutputHashes(tmp_path)
    hashes._thread.join()
    (tmp_path / "changed").write_bytes(b"other bytes")
    (tmp_path / "added").write_bytes(b"added")
    assert hashes.result() == hash_outputs(tmp_path)
    assert set(hashes.result()) == {"kept", "changed", "added"}
    hashes.stop()


def test_a_thread_that_fails_otherwise_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x")

    def fails(*_: object) -> str:
        raise MemoryError

    monkeypatch.setattr(hashes, "_sha256", fails)
    with pytest.raises(ResourceError, match="memory ran out while hashing files"):
        FileHashes([tmp_path / "a"]).result()


def test_no_thread_to_be_had_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(ResourceError, match="no more processes or threads"):
        FileHashes([tmp_path / "a"])
