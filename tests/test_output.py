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
from pathlib import Path

import pytest

from qwodel.exceptions import ResourceError, ValidationError
from qwodel.hashes import describes
from qwodel.output import StagedOutput, disk_errors, require_space, size_of


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
    assert json.loads((final.parent / "model.manifest.json").read_text()) == {
        "a": 1,
        "output": {"name": "model.gguf", "bytes": 7},
        "outputs": {"model.gguf": {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}},
    }
    assert _files(final.parent) == {"model.gguf", "model.manifest.json"}


def test_a_directory_holds_its_manifest(tmp_path: Path) -> None:
    with StagedOutput(tmp_path / "model") as output:
        (output.path / "sub").mkdir(parents=True)
        (output.path / "sub" / "w").write_bytes(b"123")
        assert size_of(output.path) == 3
        output.publish({"b": 2})
        assert output.manifest_path == tmp_path / "model" / "qwodel.manifest.json"
    manifest = json.loads((tmp_path / "model" / "qwodel.manifest.json").read_text())
    assert manifest["outputs"] == {"sub/w": {"bytes": 3, "sha256": hashlib.sha256(b"123").hexdigest()}}
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


def _aged(path: Path) -> Path:
    os.utime(path, (0, 0))
    return path


def test_folders_of_others_are_left_alone_whatever_they_are_called(tmp_path: Path) -> None:
    notes = tmp_path / ".qwodel-notes"
    alike = tmp_path / ".qwodel-0123456789ab"
    locked = tmp_path / ".qwodel-00112233445f"
    elsewhere = tmp_path / "elsewhere"
    for folder in (notes, alike, locked, elsewhere):
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    (locked / "lock").write_text("a lock of my own")
    (elsewhere / "lock").write_text("qwodel staging .qwodel-ffffffffffff\n")
    (tmp_path / ".qwodel-ffffffffffff").symlink_to(elsewhere)
    (tmp_path / ".qwodel-fffffffffff0").write_text("a file")
    for folder in (notes, alike, locked, elsewhere):
        _aged(folder)
    before = _files(tmp_path)
    with StagedOutput(tmp_path / "m"):
        pass
    assert _files(tmp_path) == before
    assert (notes / "mine.txt").read_text() == "mine"


def test_what_dies_before_it_has_marked_its_folder_leaves_nothing_for_long(tmp_path: Path) -> None:
    fresh, empty, unmarked = (tmp_path / f".qwodel-{number:012x}" for number in range(3))
    for folder in (fresh, empty, unmarked):
        folder.mkdir()
    (unmarked / "lock").touch()
    _aged(empty)
    _aged(unmarked)
    with StagedOutput(tmp_path / "m"):
        pass
    assert _files(tmp_path) == {fresh.name}


PUBLISH = """
import os, sys
from pathlib import Path
from qwodel import output
if sys.argv[2] == "no exchange":
    output._exchange = lambda *_: False
renames = 0
def dying(name):
    real = getattr(Path, name)
    def rename(self, target):
        global renames
        renames += 1
        if renames > int(sys.argv[3]):
            os.kill(os.getpid(), 9)
        return real(self, target)
    setattr(Path, name, rename)
dying("replace"), dying("rename")
final = Path(sys.argv[1])
with output.StagedOutput(final, overwrite=True) as staged:
    if final.suffix:
        staged.path.write_bytes(b"new")
    else:
        staged.path.mkdir()
        (staged.path / "w").write_bytes(b"new")
    staged.publish({"made": "new"})
"""


def _old(final: Path) -> None:
    with StagedOutput(final) as output:
        if final.suffix:
            output.path.write_bytes(b"old")
        else:
            output.path.mkdir()
            (output.path / "w").write_bytes(b"old")
        output.publish({"made": "old"})


def _killed_after(final: Path, renames: int, how: str = "") -> None:
    done = subprocess.run([sys.executable, "-c", PUBLISH, str(final), how, str(renames)], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("renames", [0, 1])
def test_a_file_replaced_by_halves_is_told_and_mended(tmp_path: Path, renames: int) -> None:
    final, manifest = tmp_path / "m.gguf", tmp_path / "m.manifest.json"
    _old(final)
    _killed_after(final, renames)
    assert final.read_bytes() == b"old"
    # The manifest says whether it is of the file beside it.
    assert describes(manifest, final) == (renames == 0)
    with StagedOutput(tmp_path / "another"):
        pass
    assert describes(manifest, final)
    assert final.read_bytes() == (b"new" if renames else b"old")
    assert _files(tmp_path) == {"m.gguf", "m.manifest.json"}


def test_a_first_publication_that_was_cut_in_two_can_be_run_again(tmp_path: Path) -> None:
    final = tmp_path / "m.gguf"
    _killed_after(final, 1)
    assert (tmp_path / "m.manifest.json").is_file()
    assert not final.exists()
    with StagedOutput(tmp_path / "another"):
        pass
    assert _files(tmp_path) == set()
    _killed_after(final, 1)
    _old(final)
    assert describes(tmp_path / "m.manifest.json", final)
    assert _files(tmp_path) == {"m.gguf", "m.manifest.json"}


@pytest.mark.parametrize("renames", [0, 1])
def test_a_directory_replaced_by_halves_is_brought_back(tmp_path: Path, renames: int) -> None:
    final = tmp_path / "model"
    _old(final)
    _killed_after(final, renames, "no exchange")
    assert final.exists() == (renames == 0)
    with StagedOutput(tmp_path / "another"):
        pass
    assert (final / "w").read_bytes() == (b"new" if renames else b"old")
    assert _files(tmp_path) == {"model", "model/w", "model/qwodel.manifest.json"}


@pytest.mark.parametrize("before", [True, False])
def test_an_interruption_between_the_two_renames_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    final = tmp_path / "m.gguf"
    if before:
        _old(final)
    real = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        real(self, target)
        monkeypatch.setattr(Path, "replace", real)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), StagedOutput(final, overwrite=True) as output:
        output.path.write_bytes(b"new")
        monkeypatch.setattr(Path, "replace", interrupted)
        output.publish({})
    if before:
        assert describes(tmp_path / "m.manifest.json", final)
    assert _files(tmp_path) == ({"m.gguf", "m.manifest.json"} if before else set())


@pytest.mark.parametrize("is_file", [True, False])
def test_a_link_in_the_place_is_replaced_and_what_it_leads_to_is_not(tmp_path: Path, is_file: bool) -> None:
    theirs, final = tmp_path / "theirs", tmp_path / "out"
    theirs.mkdir()
    (theirs / "mine.txt").write_text("mine")
    final.symlink_to(theirs)
    with StagedOutput(final, overwrite=True) as output:
        if is_file:
            output.path.write_bytes(b"new")
        else:
            output.path.mkdir()
            (output.path / "w").write_bytes(b"new")
        output.publish({})
    assert not final.is_symlink()
    assert final.is_file() == is_file
    assert (theirs / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["lock", "scratch"])
def test_names_that_staging_uses_itself_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValidationError, match=f"cannot be called {name}"), StagedOutput(tmp_path / name):
        pytest.fail("work was begun")


def test_a_name_that_the_disk_cannot_hold_is_refused_before_work(tmp_path: Path) -> None:
    with (
        pytest.raises(ValidationError, match="names there have at most"),
        StagedOutput(tmp_path / ("n" * 250)),
    ):
        pytest.fail("work was begun")
    with StagedOutput(tmp_path / ("n" * 230)) as output:
        output.path.write_bytes(b"x")
        output.publish({})
    assert _files(tmp_path) == {"n" * 230, f"{'n' * 230}.manifest.json"}


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
