from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from qwodel.exceptions import ValidationError
from qwodel.side_files import copy_side_files, files_beside, side_files, stays_inside


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "home" / "id_ed25519"
    file.parent.mkdir()
    file.write_text("PRIVATE KEY")
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name in ("config.json", "tokenizer.json", "LICENSE", "model.safetensors", "docs/usage.md", ".hidden"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_what_comes_along(model: Path) -> None:
    assert set(side_files(model)) == {"tokenizer.json", "LICENSE", "docs/usage.md"}
    assert {path.name for path in files_beside(model)} == {
        "config.json",
        "tokenizer.json",
        "LICENSE",
        "usage.md",
    }


def test_links_within_the_folder_are_files_like_any(model: Path, tmp_path: Path) -> None:
    (model / "NOTICE").symlink_to("LICENSE")
    copy_side_files(side_files(model), tmp_path / "out")
    copied = tmp_path / "out" / "NOTICE"
    assert copied.read_text() == "LICENSE"
    assert not copied.is_symlink()


@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_that_leads_out_is_left_out(
    model: Path, secret: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, absolute: bool
) -> None:
    (model / "notes.txt").symlink_to(secret if absolute else os.path.relpath(secret, model))
    (model / "more").symlink_to(secret.parent)
    with caplog.at_level(logging.WARNING):
        copy_side_files(side_files(model), tmp_path / "out")
    assert "links that lead out of the model's folder: notes.txt" in caplog.text
    assert "PRIVATE KEY" not in "".join(p.read_text() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert not (tmp_path / "out" / "more").exists()


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "vocab.txt",
        "x.model",
    ],
)
def test_one_that_a_library_would_read_is_refused(model: Path, secret: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    with pytest.raises(ValidationError, match=f"{name} is a link that leads out") as caught:
        files_beside(model)
    assert "a copy" in (caught.value.hint or "")


def test_weights_may_be_links_and_those_of_a_pipeline_that_are_copied_may_not(
    model: Path, secret: Path
) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(secret)
    files_beside(model)
    (model / "vae").mkdir()
    (model / "vae" / "weights.bin").symlink_to(secret)
    quantized = [model / "model.safetensors"]
    with pytest.raises(ValidationError, match=r"weights\.bin is a link that leads out"):
        side_files(model, pipeline=True, quantized=quantized)


def _cache(folder: Path) -> Path:
    """A model as huggingface_hub lays it out: links to blobs."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    (snapshot / "onnx").mkdir(parents=True)
    for number, name in enumerate(("config.json", "tokenizer.json", "LICENSE", "onnx/readme.md")):
        (blobs / f"blob{number}").write_text(name)
        (snapshot / name).symlink_to(os.path.relpath(blobs / f"blob{number}", (snapshot / name).parent))
    return snapshot


def test_the_hubs_cache_goes_on_working(tmp_path: Path) -> None:
    snapshot = _cache(tmp_path / "models--a--b")
    found = side_files(snapshot)
    assert set(found) == {"tokenizer.json", "LICENSE", "onnx/readme.md"}
    copy_side_files(found, tmp_path / "out")
    assert (tmp_path / "out" / "onnx" / "readme.md").read_text() == "onnx/readme.md"
    assert stays_inside(snapshot / "config.json", snapshot)


def test_a_folder_that_only_looks_like_the_cache_leads_nowhere(tmp_path: Path, secret: Path) -> None:
    snapshot = _cache(tmp_path / "evil")
    blobs = tmp_path / "evil" / "blobs"
    blobs.rename(tmp_path / "evil" / "moved")
    blobs.symlink_to(secret.parent)
    (snapshot / "stolen").symlink_to("../../blobs/id_ed25519")
    assert not stays_inside(snapshot / "stolen", snapshot)
    (snapshot / "sideways").symlink_to("../../other")
    (tmp_path / "evil" / "other").write_text("x")
    assert not stays_inside(snapshot / "sideways", snapshot)
