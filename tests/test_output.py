from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwodel.exceptions import ResourceError, ValidationError
from qwodel.output import FileHashes, StagedOutput, disk_errors, require_space, size_of


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_file_and_its_manifest_appear_together(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "er" / "model.gguf"
    with StagedOutput(final) as output:
        output.path.write_bytes(b"weights")
        (output.scratch / "intermediate").write_bytes(b"x")
        assert not final.exists()
        assert output.publish({"a": 1}) == final
    assert final.read_bytes() == b"weights"
    assert json.loads((final.parent / "model.manifest.json").read_text()) == {"a": 1}
    assert _files(final.parent) == {"model.gguf", "model.manifest.json"}


def test_a_directory_holds_its_manifest(tmp_path: Path) -> None:
    with StagedOutput(tmp_path / "model") as output:
        (output.path / "sub").mkdir(parents=True)
        (output.path / "sub" / "w").write_bytes(b"123")
        assert size_of(output.path) == 3
        output.publish({"b": 2})
        assert output.manifest_path == tmp_path / "model" / "qwodel.manifest.json"
    assert _files(tmp_path) == {"model", "model/sub", "model/sub/w", "model/qwodel.manifest.json"}


def test_a_failure_leaves_nothing_not_even_the_folders_it_made(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="halfway"),
        StagedOutput(tmp_path / "new" / "out" / "m.gguf") as output,
    ):
        output.path.write_bytes(b"half")
        raise RuntimeError("halfway")
    assert _files(tmp_path) == set()


def test_an_existing_output_is_kept_unless_asked(tmp_path: Path) -> None:
    final = tmp_path / "m.gguf"
    final.write_bytes(b"old")
    with pytest.raises(ValidationError, match="exists already") as caught, StagedOutput(final):
        pass
    assert "overwrite=True" in (caught.value.hint or "")
    assert _files(tmp_path) == {"m.gguf"}
    with StagedOutput(final, overwrite=True) as output:
        output.path.write_bytes(b"new")
        assert final.read_bytes() == b"old"
        output.publish({})
    assert final.read_bytes() == b"new"


def test_what_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    final = tmp_path / "m.gguf"
    with pytest.raises(ValidationError, match="exists already"), StagedOutput(final) as output:
        output.path.write_bytes(b"mine")
        final.write_bytes(b"theirs")
        output.publish({})
    assert final.read_bytes() == b"theirs"
    assert _files(tmp_path) == {"m.gguf"}


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    final = tmp_path / "model"
    final.mkdir()
    (final / "stale").write_text("old")
    with StagedOutput(final, overwrite=True) as output:
        output.path.mkdir()
        (output.path / "fresh").write_text("new")
        output.publish({})
    assert _files(tmp_path) == {"model", "model/fresh", "model/qwodel.manifest.json"}


HOLD = """
import sys, time
from pathlib import Path
from qwodel.output import StagedOutput
with StagedOutput(Path(sys.argv[1])) as output:
    output.path.write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_publishes_nothing_and_the_next_run_cleans(tmp_path: Path) -> None:
    final = tmp_path / "m.gguf"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(final)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with StagedOutput(tmp_path / "other.gguf"):
        # A living process's staging is left alone.
        assert len(list(tmp_path.glob(".qwodel-*"))) == 2
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert not final.exists()
    assert len(list(tmp_path.glob(".qwodel-*"))) == 1
    with StagedOutput(final) as output:
        assert len(list(tmp_path.glob(".qwodel-*"))) == 1
        output.path.write_bytes(b"whole")
        output.publish({})
    assert _files(tmp_path) == {"m.gguf", "m.manifest.json"}


def test_staging_without_a_lock_is_cleaned_only_when_old(tmp_path: Path) -> None:
    fresh, old = tmp_path / ".qwodel-fresh", tmp_path / ".qwodel-old"
    fresh.mkdir()
    old.mkdir()
    os.utime(old, (time.time() - 3600,) * 2)
    with StagedOutput(tmp_path / "m"):
        pass
    assert fresh.exists()
    assert not old.exists()


def _stage_as_nobody(final: Path, answers: multiprocessing.SimpleQueue[str]) -> None:
    if os.geteuid() == 0:  # root may write anywhere
        os.setuid(65534)
    try:
        with StagedOutput(final):
            answers.put("staged")
    except ValidationError as error:
        answers.put(f"{error} | {error.hint}")


def test_a_read_only_directory_is_a_validation_error(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    for parent in [tmp_path, *tmp_path.parents][:3]:
        parent.chmod(parent.stat().st_mode | 0o055)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_stage_as_nobody, args=(folder / "m.gguf", answers))
    child.start()
    child.join()
    answer = answers.get()
    assert "cannot be written: Permission denied" in answer
    assert "choose another output_dir" in answer
    assert _files(folder) == set()


def test_a_full_disk_is_a_resource_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with (
            pytest.raises(ResourceError, match="file size limit is reached while writing") as caught,
            StagedOutput(tmp_path / "m.gguf") as output,
            disk_errors("writing m.gguf"),
        ):
            output.path.write_bytes(bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.hint
    assert _files(tmp_path) == set()


def test_other_os_errors_pass_through_disk_errors() -> None:
    with pytest.raises(OSError, match="odd") as caught, disk_errors("x"):
        raise OSError(errno.EIO, "odd")
    assert not isinstance(caught.value, ResourceError)
    with pytest.raises(ResourceError, match="the disk is full while x"), disk_errors("x"):
        raise OSError(errno.ENOSPC, "full")


def test_space_is_required_where_the_folder_will_be(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1, "nothing")
    with pytest.raises(ResourceError, match="needs about 1152921504.61 GB"):
        require_space(tmp_path / "not" / "yet", 1 << 60, "a lot")


def test_hashes_are_sha256(tmp_path: Path) -> None:
    files = []
    for index, size in enumerate((0, 1, 5 << 20)):
        files.append(tmp_path / f"{index}.bin")
        files[-1].write_bytes(os.urandom(size))
    expected = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert FileHashes(files).result() == expected
    with pytest.raises(FileNotFoundError):
        FileHashes([tmp_path / "none"]).result()
