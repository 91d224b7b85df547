"""The pipeline: same bytes as one task after another, bounded memory, and a second attempt on the CPU."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qwodel.checkpoint.run.pipeline as pipeline
import qwodel.checkpoint.run.tensor_compute as tensor_compute
import qwodel.checkpoint.run.tensor_work as tensor_work
from qwodel.algorithms.learned_rounding import RoundingOptions
from qwodel.checkpoint.formats.registry import storage_format
from qwodel.checkpoint.layouts.comfyui import ComfyUILayout
from qwodel.checkpoint.lora.merge import LoraSource
from qwodel.checkpoint.plan.planning import build_plan
from qwodel.checkpoint.plan.recipe import LayerOverride, Recipe
from qwodel.checkpoint.rounding.methods import LayerWeight, Learned, Nearest, Rounding, ScaleSearch
from qwodel.checkpoint.run.convert import Conversion, convert_checkpoint
from qwodel.checkpoint.run.device_executor import CoresExecutor, executor_for, make_executor
from qwodel.checkpoint.run.executor import Executor, ProcessExecutor, SerialExecutor, ThreadExecutor
from qwodel.checkpoint.run.pipeline import PipelineExecutor
from qwodel.checkpoint.run.verify import verify
from qwodel.devices import StreamingOptions, StreamingThresholds, resolve_device
from qwodel.exceptions import Cancelled, ConfigurationError, ResourceError, ValidationError
from qwodel.progress import Progress
from tests.checkpoint.checkpoints import llama_weights, random_weights

CPU = torch.device("cpu")
VICTIM = "model.layers.0.mlp.down_proj"


@dataclass(frozen=True)
class OutOfMemory(Rounding):
    """Nearest rounding whose memory runs out for one layer, ``times`` times."""

    times: int = 1
    calls: list[str] = field(default_factory=list, compare=False)
    name: str = "out-of-memory"

    def round(self, given: LayerWeight) -> Any:
        self.calls.append(given.layer)
        if given.layer == VICTIM and self.calls.count(given.layer) <= self.times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return given.nearest()


def source(folder: Path) -> Path:
    save_file(
        llama_weights(2) | {"steps": torch.arange(5), "t": torch.tensor(0.5)}, folder / "in.safetensors"
    )
    return folder / "in.safetensors"


def run(
    path: Path, target: Path, executor: Executor, name: str = "int8_row", rounding: Rounding | None = None,
    progress: Progress | None = None, **recipe: Any,
) -> Conversion:  # fmt: skip
    plan = build_plan(path, Recipe(format=storage_format(name), rounding=rounding, **recipe), ComfyUILayout())
    return convert_checkpoint(plan, target, executor=executor, progress=progress)


EXECUTORS: list[Executor] = [PipelineExecutor(CPU), CoresExecutor(3)]


@pytest.fixture(params=["whole", "slabs"])
def slabs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in one slab, or in many."""
    if request.param == "slabs":
        monkeypatch.setattr(tensor_work, "SLAB_ELEMENTS", 500)
        monkeypatch.setattr(tensor_work, "CACHED_ELEMENTS", 300)
        monkeypatch.setattr(tensor_work, "_COPY_BYTES", 700)


@pytest.mark.parametrize(
    ("name", "rounding"),
    [
        ("int8_row", Nearest()), ("fp8_e4m3", Nearest()), ("int8_block", Nearest()), ("fp16", None),
        ("fp8_e4m3_row", ScaleSearch()), ("fp8_e4m3", Learned(RoundingOptions(num_iter=5))),
    ],
)  # fmt: skip
def test_the_bytes_are_those_of_one_task_after_another(
    tmp_path: Path, slabs: None, name: str, rounding: Rounding | None
) -> None:
    path = source(tmp_path)
    run(path, tmp_path / "a", SerialExecutor(), name, rounding)
    for executor in EXECUTORS:
        conversion = run(path, tmp_path / "b", executor, name, rounding)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert len(verify(conversion, executor=CoresExecutor(2))) == (0 if name == "fp16" else 8)
        assert not conversion.fell_back


def test_merges_have_the_same_bytes_too(tmp_path: Path) -> None:
    path = source(tmp_path)
    low = random_weights({"lora_A.weight": (7, 96), "lora_B.weight": (48, 7)}, torch.float32)
    save_file({f"{VICTIM}.{name}": tensor for name, tensor in low.items()}, tmp_path / "lora.safetensors")
    loras = (LoraSource(tmp_path / "lora.safetensors"),)
    run(path, tmp_path / "a", SerialExecutor(), loras=loras)
    for executor in EXECUTORS:
        run(path, tmp_path / "b", executor, loras=loras)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_cpu_takes_over_what_does_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = source(tmp_path)
    run(path, tmp_path / "a", SerialExecutor(), rounding=Nearest())
    rounding = OutOfMemory()
    with caplog.at_level(logging.WARNING):
        conversion = run(path, tmp_path / "b", PipelineExecutor(CPU), rounding=rounding)
    assert conversion.fell_back == (f"{VICTIM}.weight",)
    assert f"{VICTIM}.weight does not fit" in caplog.text
    assert rounding.calls.count(VICTIM) == 2
    assert len(rounding.calls) == 9
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_out_of_memory_twice_is_an_error_that_names_the_weight(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"down_proj\.weight.*then on the CPU"):
        run(source(tmp_path), tmp_path / "out", PipelineExecutor(CPU), rounding=OutOfMemory(2))


def test_without_memory_limits_there_is_no_second_attempt(tmp_path: Path) -> None:
    executor = PipelineExecutor(CPU, StreamingOptions(no_memory_limits=True))
    with pytest.raises(ResourceError, match=r"down_proj\.weight.*ran out of memory") as caught:
        run(source(tmp_path), tmp_path / "out", executor, rounding=OutOfMemory())
    assert caught.value.hint


def test_a_serial_run_has_a_typed_error_too(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"down_proj\.weight"):
        run(source(tmp_path), tmp_path / "out", SerialExecutor(), rounding=OutOfMemory())


class Tasks:
    """A staged worker that says what it did, where, and how much was alive at once."""

    def __init__(self, sizes: dict[str, int] | None = None, piece: int = 1000) -> None:
        self.sizes, self.piece = sizes or {}, piece
        self.places: dict[str, str] = {}
        self.alive, self.most = 0, 0
        self.lock = threading.Lock()
        self.written: list[str] = []
        self.slow_writer = threading.Event()

    def __enter__(self) -> Tasks:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, task: str) -> str:
        raise AssertionError("the pipeline runs stages")

    def needs(self, task: str) -> dict[str, int]:
        return {"hadamard": self.sizes[task]} if task in self.sizes else {}

    def read(self, task: str) -> Iterator[torch.Tensor]:
        for _ in range(3):
            with self.lock:
                self.alive += self.piece
                self.most = max(self.most, self.alive)
            yield torch.zeros(self.piece, dtype=torch.uint8)

    def compute(self, task: str, pieces: Iterator[torch.Tensor], device: torch.device) -> Any:
        self.places[task] = device.type
        for piece in pieces:
            yield tensor_compute.Write(task, piece)
        return task

    def write(self, item: tensor_compute.Write) -> None:
        self.slow_writer.wait(0.002)
        with self.lock:
            self.alive -= self.piece
        self.written.append(item.tensor)

    def fell_back(self, result: str) -> str:
        return f"{result} again"


def test_memory_is_bounded_however_many_tasks_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "QUEUE_BYTES", 5000)
    worker = Tasks()
    names = [f"task{n}" for n in range(60)]
    assert list(PipelineExecutor(CPU).run(lambda: worker, names)) == names  # type: ignore[type-var]
    assert worker.written == [name for name in names for _ in range(3)]
    # Two full queues, and a piece in the hands of each of three stages.
    assert 4000 <= worker.most <= 2 * 5000 + 3 * 1000


def test_a_piece_larger_than_the_queue_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "QUEUE_BYTES", 10)
    worker = Tasks()
    assert list(PipelineExecutor(CPU).run(lambda: worker, ["a", "b"])) == ["a", "b"]  # type: ignore[type-var]


def test_large_weights_go_to_the_cpu() -> None:
    worker = Tasks({"small": 10, "large": 11, "slabs": 0})
    options = StreamingOptions("balanced", {"hadamard": 10})
    meta = torch.device("meta")
    list(PipelineExecutor(meta, options).run(lambda: worker, ["small", "large", "slabs"]))  # type: ignore[type-var]
    assert worker.places == {"small": "meta", "large": "cpu", "slabs": "meta"}


def test_auto_lowers_its_thresholds_after_an_out_of_memory() -> None:
    """32 bytes a weight: 3200 free bytes hold 100 weights, 75 after the first failure."""
    worker = Tasks({"a": 100, "b": 90, "c": 75, "d": 101})
    plain = worker.compute

    def compute(task: str, pieces: Iterator[torch.Tensor], device: torch.device) -> Any:
        if task == "a" and device.type == "meta":
            next(pieces)
            raise torch.OutOfMemoryError("full")
        return (yield from plain(task, pieces, device))

    worker.compute = compute  # type: ignore[method-assign]
    executor = PipelineExecutor(torch.device("meta"), StreamingOptions("auto"), lambda _: 3200)
    results = list(executor.run(lambda: worker, ["a", "b", "c", "d"]))  # type: ignore[type-var]
    assert results == ["a again", "b", "c", "d"]
    assert worker.places == {"a": "cpu", "b": "cpu", "c": "meta", "d": "cpu"}


@pytest.mark.parametrize("stage", ["read", "compute", "write"])
def test_a_failure_in_any_stage_ends_the_run_and_its_threads(stage: str) -> None:
    worker = Tasks()

    def fail(*_: Any) -> Any:
        raise ValueError(f"{stage} failed")

    setattr(worker, stage, fail)
    with pytest.raises(ValueError, match=f"{stage} failed"):
        list(PipelineExecutor(CPU).run(lambda: worker, [f"{n}" for n in range(50)]))  # type: ignore[type-var]
    assert not [each for each in threading.enumerate() if each.name.startswith("qwodel-")]


def test_bad_weights_are_named_once(tmp_path: Path) -> None:
    weights = llama_weights(1)
    weights[f"{VICTIM}.weight"][1, 1] = torch.nan
    save_file(weights, tmp_path / "in.safetensors")
    with pytest.raises(ValidationError) as caught:
        run(tmp_path / "in.safetensors", tmp_path / "out", PipelineExecutor(CPU))
    assert str(caught.value).count("down_proj") == 1


def test_cancelling_stops_the_threads(tmp_path: Path) -> None:
    def callback(percent: int, stage: str, message: str) -> None:
        if percent > 20:
            raise RuntimeError("enough")

    threads = torch.get_num_threads()
    with pytest.raises(Cancelled):
        run(
            source(tmp_path),
            tmp_path / "out",
            PipelineExecutor(CPU),
            progress=Progress(callback, {"quantize": 1}),
        )
    assert not [each for each in threading.enumerate() if each.name.startswith("qwodel-")]
    assert torch.get_num_threads() == threads


def test_which_executor_serves_a_device() -> None:
    assert executor_for(CPU, 1) == make_executor() == CoresExecutor()
    assert executor_for(CPU, 2) == ProcessExecutor(2)
    cuda = torch.device("cuda")
    assert executor_for(cuda, 2, StreamingOptions("off")) == PipelineExecutor(cuda, StreamingOptions("off"))
    with pytest.raises(ConfigurationError, match="workers"):
        executor_for(CPU, 0)


class Plain:
    """A worker without stages."""

    def __init__(self, bad: str = "") -> None:
        self.bad, self.threads = bad, set[int]()

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, task: str) -> str:
        assert torch.get_num_threads() == 1
        self.threads.add(threading.get_ident())
        if task == self.bad:
            raise ValidationError("bad task", hint="another")
        return task.upper()


def test_workers_without_stages_run_in_threads() -> None:
    worker, before = Plain(), torch.get_num_threads()
    names = [f"task{n}" for n in range(50)]
    found = list(CoresExecutor().run(lambda: worker, names))  # type: ignore[type-var]
    assert sorted(found) == sorted(name.upper() for name in names)
    assert threading.get_ident() not in worker.threads
    assert torch.get_num_threads() == before


@dataclass(frozen=True)
class Places(Rounding):
    """Nearest rounding of whole weights that notes who computed them."""

    seen: list[tuple[str, str]] = field(default_factory=list, compare=False)
    name: str = "places"

    def round(self, given: LayerWeight) -> Any:
        self.seen.append((given.layer, threading.current_thread().name))
        return given.nearest()


def test_weights_in_slabs_share_the_cores_and_whole_ones_come_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, threads = source(tmp_path), set[str]()
    run(path, tmp_path / "a", SerialExecutor(), rounding=Nearest())
    plain = tensor_work.compute_tensor

    def compute(plan: Any, *rest: Any) -> Any:
        if plan.rounding == Nearest():
            threads.add(threading.current_thread().name)
        return plain(plan, *rest)

    monkeypatch.setattr(tensor_work, "compute_tensor", compute)
    whole = Places()
    override = LayerOverride("down_proj", storage_format("int8_row"), whole)
    run(path, tmp_path / "b", CoresExecutor(3), rounding=Nearest(), custom_layers=override)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert threads == {"qwodel-work"}
    assert [name for _, name in whole.seen] == [threading.current_thread().name] * 2


def test_a_failing_thread_ends_the_others() -> None:
    with pytest.raises(ValidationError, match="bad task") as caught:
        list(ThreadExecutor(3).run(lambda: Plain("7"), [f"{n}" for n in range(1000)]))  # type: ignore[type-var]
    assert caught.value.hint == "another"
    assert not [each for each in threading.enumerate() if each.name.startswith("qwodel-")]


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == CPU
    for name in ("gpu", "cuda:x", "cpu:1"):
        with pytest.raises(ConfigurationError, match="no device"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    with pytest.raises(ConfigurationError, match="is not there") as caught:
        resolve_device("cuda")
    assert caught.value.hint
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ConfigurationError, match="numbered 0 to 0"):
        resolve_device("cuda:3")


def test_streaming_options_are_checked() -> None:
    for bad in (
        {"mode": "wild"}, {"overrides": {"nonsense": 1}}, {"overrides": {"ldlq": -1}},
        {"overrides": {"ldlq": 1}, "no_memory_limits": True},
    ):  # fmt: skip
        with pytest.raises(ConfigurationError):
            StreamingOptions(**bad)  # type: ignore[arg-type]
    balanced = StreamingOptions("balanced", {"ldlq": None, "ortho": 7}).thresholds_for(None)
    assert balanced == StreamingThresholds(100_000_000, 24576, None, 7)
    assert StreamingOptions("balanced", no_memory_limits=True).thresholds_for(8) == StreamingThresholds()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(
    "name", ["int8_row", "int8_tensor", "int8_block", "fp8_e4m3", "fp8_e4m3_block", "fp16"]
)
def test_rounding_to_nearest_on_cuda_has_the_bytes_of_the_cpu(tmp_path: Path, slabs: None, name: str) -> None:
    path = source(tmp_path)
    run(path, tmp_path / "a", SerialExecutor(), name, Nearest())
    conversion = run(path, tmp_path / "b", executor_for(resolve_device("cuda"), 1), name, Nearest())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert not conversion.fell_back
