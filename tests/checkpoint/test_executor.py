"""Threads that fail where they can: the run ends with that error, and no thread outlives it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from qwodel import quantize
from qwodel.checkpoint.run import executor
from qwodel.checkpoint.run.crew import Crew
from qwodel.checkpoint.run.executor import ProcessExecutor, ThreadExecutor
from qwodel.checkpoint.run.pipeline import PipelineExecutor
from qwodel.exceptions import QuantizationError, ResourceError

pytestmark = pytest.mark.timeout(60)  # what these tests are about is hanging

CPU = torch.device("cpu")
NO_MEMORY = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"


class Worker:
    """Both kinds of worker; fails where it is told to."""

    def __init__(self, where: str = "", error: BaseException | None = None) -> None:
        self.where, self.error = where, error

    def __enter__(self) -> Worker:
        self._reached("enter")
        return self

    def __exit__(self, *_: object) -> None:
        self._reached("exit")

    def __call__(self, task: str) -> str:
        self._reached("call")
        return task

    def needs(self, task: str) -> Mapping[str, int]:
        return {}

    def read(self, task: str) -> Iterator[torch.Tensor]:
        self._reached("read")
        yield torch.ones(2)

    def compute(
        self, task: str, pieces: Iterator[torch.Tensor], device: torch.device
    ) -> Generator[torch.Tensor, None, str]:
        self._reached("compute")
        yield from pieces
        return task

    def write(self, item: torch.Tensor) -> None:
        self._reached("write")

    def fell_back(self, result: str) -> str:
        return result

    def _reached(self, where: str) -> None:
        if where == self.where and self.error is not None:
            raise self.error


def own_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("qwodel-")]


def run(chosen: Any, worker: Worker) -> list[str]:
    return list(chosen.run(lambda: worker, [f"{number}" for number in range(50)]))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(NO_MEMORY), ResourceError),
        (MemoryError(), ResourceError),
        (KeyError("odd"), KeyError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize(
    ("chosen", "where"),
    [(ThreadExecutor(3), each) for each in ("enter", "call", "exit")]
    + [(PipelineExecutor(CPU), each) for each in ("read", "compute", "write")],
)
def test_a_failure_anywhere_ends_the_run(
    chosen: Any, where: str, error: BaseException, expected: type[BaseException]
) -> None:
    if where == "compute" and expected is ResourceError:
        expected = type(error)  # computed in the caller's own thread, where the worker gives it its name
    with pytest.raises(expected):
        run(chosen, Worker(where, error))
    assert not own_threads()
    assert sorted(run(chosen, Worker())) == sorted(f"{number}" for number in range(50))


def test_a_failure_before_the_first_task_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError(NO_MEMORY)

    monkeypatch.setattr(executor, "_keep_freed_memory", fail)
    with pytest.raises(ResourceError, match="memory ran out") as caught:
        run(ThreadExecutor(2), Worker())
    assert NO_MEMORY in str(caught.value.__cause__)
    assert not own_threads()


@pytest.mark.parametrize("chosen", [ThreadExecutor(3), PipelineExecutor(CPU)])
@pytest.mark.parametrize("left", [0, 1, 2])
def test_threads_that_cannot_start(chosen: Any, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for ``left`` threads, where more are wanted."""
    if left == 2 and isinstance(chosen, PipelineExecutor):
        pytest.skip("two are all it wants")
    start, count = threading.Thread.start, iter(range(100))

    def limited(thread: threading.Thread) -> None:
        if thread.name in ("qwodel-work", "qwodel-read", "qwodel-write") and next(count) >= left:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    before = torch.get_num_threads()
    with pytest.raises(ResourceError, match="no more processes or threads"):
        run(chosen, Worker())
    assert not own_threads()
    assert torch.get_num_threads() == before


def test_processes_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(ResourceError, match="no more processes or threads"):
        list(ProcessExecutor(1).run(Worker, ["a"]))


def test_a_conversion_without_threads_leaves_nothing(
    stories15m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if thread.name == "qwodel-work":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(QuantizationError, match="threads"):
        quantize(stories15m, tmp_path / "out", "int8", "int8_row")
    assert not (tmp_path / "out").exists()
    assert not own_threads()


def test_a_crew_says_how_each_of_its_threads_ended() -> None:
    crew, ends = Crew(), []
    works: list[Callable[[], Any]] = [lambda: None, lambda: 1 // 0]
    for work in works:
        crew.start("qwodel-test", work, ends.append)
    crew.join()
    assert {type(end) for end in ends} == {type(None), ZeroDivisionError}
