"""What the base does for every backend, seen through one that only copies."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from qwodel.backends.base import BackendOptions, BaseQuantizer, FormatSpec, Job
from qwodel.exceptions import IntegrityError, ResourceError, ValidationError
from qwodel.progress import Progress
from qwodel.source import ModelSource, inspect_source

SAME = FormatSpec("same", "the same bytes", 32.0, "everybody")
Then = Callable[[Job[BackendOptions]], object]


class Copier(BaseQuantizer[BackendOptions]):
    name: ClassVar[str] = "copy"
    extra: ClassVar[str] = "copy"
    accepts: ClassVar[frozenset[str]] = frozenset({"huggingface", "safetensors"})
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    options_type = BackendOptions

    def __init__(self, then: Then) -> None:
        super().__init__()
        self.then = then

    @classmethod
    def formats(cls) -> Mapping[str, FormatSpec]:
        return {"same": SAME}

    def output_name(self, source: ModelSource, spec: FormatSpec, options: BackendOptions) -> str:
        return f"{source.name}-same.safetensors"

    def run(self, job: Job[BackendOptions]) -> None:
        shutil.copyfile(job.source.weight_files[0], job.output.path)
        self.then(job)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(4, 4)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("about")
    return folder


def run(model: Path, out: Path, then: Then = lambda _: None) -> dict[str, Any]:
    result = Copier(then).quantize(inspect_source(model), out, SAME, BackendOptions(), Progress(None))
    manifest: dict[str, Any] = json.loads(result.manifest.read_text("utf-8"), parse_constant=pytest.fail)
    return manifest


def test_a_manifest_has_the_envelope_and_the_report(model: Path, tmp_path: Path) -> None:
    def report(job: Job[BackendOptions]) -> None:
        job.report |= {"gain": math.inf, "layers": {"a": math.nan, "b": -1.5}, "schema": "mine"}

    manifest = run(model, tmp_path / "out", report)
    assert list(manifest)[:9] == [
        "schema", "qwodel", "backend", "format", "source", "recipe", "output", "outputs", "versions",
    ]  # fmt: skip
    assert manifest["schema"] == 1
    assert manifest["source"]["sha256"].keys() == {"model.safetensors"}
    assert manifest["recipe"] == {"overwrite": False, "revision": None}
    assert manifest["versions"].keys() == {"python", "torch"}
    assert manifest["gain"] is None
    assert manifest["layers"] == {"a": None, "b": -1.5}
    # A copy has its source's hash.
    name = "model-same.safetensors"
    assert manifest["outputs"][name]["sha256"] == manifest["source"]["sha256"]["model.safetensors"]
    assert manifest["output"] == {"name": name, "bytes": manifest["outputs"][name]["bytes"]}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_a_source_that_changes_meanwhile_is_not_published(model: Path, tmp_path: Path, name: str) -> None:
    def change(job: Job[BackendOptions]) -> None:
        with (model / name).open("r+b") as file:
            file.write(b"\0")

    with pytest.raises(IntegrityError, match=rf"{name} changed while it was being quantized"):
        run(model, tmp_path / "out", change)
    assert not (tmp_path / "out").exists()


def test_files_that_nothing_reads_may_change(model: Path, tmp_path: Path) -> None:
    for name in ("training.log.bin", ".cache"):
        (model / name).write_text("before")
    run(
        model,
        tmp_path / "out",
        lambda _: [(model / n).write_text("after") for n in ("training.log.bin", ".cache")],
    )


def _raise(error: Exception) -> Then:
    def then(job: Job[BackendOptions]) -> None:
        raise error

    return then


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_memory_that_runs_out_is_a_resource_error(model: Path, tmp_path: Path, error: Exception) -> None:
    with pytest.raises(ResourceError, match="memory ran out while making model-same") as caught:
        run(model, tmp_path / "out", _raise(error))
    assert caught.value.__cause__ is error
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_what_the_system_refuses_is_a_resource_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="Input/output error: '/dev/broken'"):
        run(model, tmp_path / "out", _raise(OSError(errno.EIO, "Input/output error", "/dev/broken")))


def test_other_errors_stay_what_they_are(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(model, tmp_path / "out", lambda _: 1 / 0)
    assert not (tmp_path / "out").exists()


def test_an_output_directory_that_vanishes_is_a_resource_error(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ResourceError, match="was removed while the run was writing to it"):
        run(model, out, lambda _: shutil.rmtree(out))
    assert not out.exists()


def test_a_place_that_cannot_hold_the_name_is_refused_before_work(tmp_path: Path) -> None:
    folder = tmp_path / ("n" * 245)
    folder.mkdir()
    save_file({"w": torch.ones(4, 4)}, folder / "model.safetensors")
    with pytest.raises(ValidationError, match="names there have at most"):
        run(folder, tmp_path / "out", lambda _: pytest.fail("work was begun"))
