"""A conversion on its way: files forced to disk, dead workers, errors, cancelling, progress."""

from __future__ import annotations

import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import qwodel.checkpoint.run.convert as convert_module
from qwodel.checkpoint.formats.registry import storage_format
from qwodel.checkpoint.layouts.comfyui import ComfyUILayout
from qwodel.checkpoint.layouts.transformers import TransformersLayout
from qwodel.checkpoint.plan.planning import build_plan
from qwodel.checkpoint.plan.recipe import Recipe
from qwodel.checkpoint.rounding.methods import Rounding
from qwodel.checkpoint.run.convert import convert_checkpoint
from qwodel.checkpoint.run.device_executor import make_executor
from qwodel.checkpoint.run.executor import ProcessExecutor
from qwodel.exceptions import Cancelled, ConversionError, ValidationError
from qwodel.progress import Progress
from tests.checkpoint.checkpoints import llama_weights, run, save_sharded


def test_files_are_forced_to_disk_while_tensors_are_still_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_sharded(tmp_path / "in", llama_weights(2), 2)
    (tmp_path / "in" / "config.json").write_text("{}")
    events: list[str] = []
    plain = convert_module._sync
    monkeypatch.setattr(convert_module, "_SYNC_BYTES", 6000)
    monkeypatch.setattr(convert_module, "_sync", lambda path: (events.append(path.name), plain(path)))
    recipe = Recipe(format=storage_format("int8_row"), max_shard_size=20_000)
    plan = build_plan(tmp_path / "in", recipe, TransformersLayout())
    (tmp_path / "out").mkdir()
    progress = Progress(lambda *args: events.append("progress"), {"quantize": 1})
    conversion = convert_checkpoint(plan, tmp_path / "out", progress=progress)
    files = sorted(path.name for path in conversion.files)
    # Some on the way, and each of them once at the end.
    assert len(files) > 1
    assert sorted(events[-len(files) :]) == files
    assert set(events[: -len(files)]) > {"progress"}


class Breaks(Rounding):
    """A rounding whose worker dies."""

    name = "breaks"

    def round(self, given: Any) -> Any:
        os._exit(9)


def test_a_dead_worker_is_a_typed_error(tmp_path: Path) -> None:
    save_file(llama_weights(1), tmp_path / "in.safetensors")
    plan = build_plan(
        tmp_path / "in.safetensors",
        Recipe(format=storage_format("int8_row"), rounding=Breaks()),
        ComfyUILayout(),
    )
    with pytest.raises(ConversionError, match="worker process died"):
        convert_checkpoint(plan, tmp_path / "out.safetensors", executor=ProcessExecutor(2))


def test_errors_cross_from_workers_with_their_hint(tmp_path: Path) -> None:
    weights = llama_weights(1)
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(weights, tmp_path / "in.safetensors")
    with pytest.raises(ValidationError, match="down_proj") as caught:
        run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", workers=2)
    assert caught.value.hint


def test_a_callback_that_raises_cancels(tmp_path: Path) -> None:
    save_file(llama_weights(1), tmp_path / "in.safetensors")

    def callback(percent: int, stage: str, message: str) -> None:
        if percent > 50:
            raise RuntimeError("enough")

    plan = build_plan(tmp_path / "in.safetensors", Recipe(format=storage_format("int8_row")), ComfyUILayout())
    with pytest.raises(Cancelled):
        convert_checkpoint(
            plan,
            tmp_path / "out.safetensors",
            progress=Progress(callback, {"quantize": 1}),
            executor=make_executor(2),
        )


def test_an_interrupt_leaves_no_process_behind(tmp_path: Path) -> None:
    save_file(llama_weights(1), tmp_path / "in.safetensors")

    def callback(percent: int, stage: str, message: str) -> None:
        if percent > 20:
            raise KeyboardInterrupt

    plan = build_plan(tmp_path / "in.safetensors", Recipe(format=storage_format("int8_row")), ComfyUILayout())
    progress = Progress(callback, {"quantize": 1})
    with pytest.raises(KeyboardInterrupt) as caught:
        convert_checkpoint(plan, tmp_path / "out.safetensors", progress=progress, executor=make_executor(2))
    assert not multiprocessing.active_children()
    assert caught.value.__traceback__ is not None


def test_progress_counts_bytes_up_to_the_end_of_the_stage(tmp_path: Path) -> None:
    save_file(llama_weights(2), tmp_path / "in.safetensors")
    seen: list[int] = []
    plan = build_plan(tmp_path / "in.safetensors", Recipe(format=storage_format("int8_row")), ComfyUILayout())
    conversion = convert_checkpoint(
        plan, tmp_path / "out.safetensors", progress=Progress(lambda p, *_: seen.append(p), {"quantize": 1})
    )
    assert seen == sorted(seen)
    assert seen[-1] == 99
    assert conversion.files == (tmp_path / "out.safetensors",)
