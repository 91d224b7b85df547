"""A thread that computes on one core changes nothing for any other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from qwodel.algorithms.determinism import compute_threads, one_thread
from qwodel.exceptions import ResourceError


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    """More than one, on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def in_thread(work: Callable[[], int]) -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_only_this_thread_computes_on_one() -> None:
    waiting, go, found = threading.Event(), threading.Event(), []

    def earlier() -> None:
        found.append(torch.get_num_threads())
        waiting.set()
        go.wait()
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=earlier)
    thread.start()
    waiting.wait()
    with one_thread():
        assert torch.get_num_threads() == 1
        go.set()
        thread.join()
        assert found == [3, 3]
        assert in_thread(torch.get_num_threads) == 3
    assert torch.get_num_threads() == 3
    assert in_thread(torch.get_num_threads) == 3


def test_threads_that_leave_in_the_order_of_their_coming() -> None:
    """Saving and restoring the process's number would leave it at one."""
    first, second = one_thread(), threading.Event()
    leave = threading.Event()

    def other() -> None:
        with one_thread():
            second.set()
            leave.wait()

    thread = threading.Thread(target=other)
    first.__enter__()
    thread.start()
    second.wait()
    first.__exit__(None, None, None)
    leave.set()
    thread.join()
    assert torch.get_num_threads() == 3
    assert in_thread(torch.get_num_threads) == 3


def test_contexts_nest_and_none_changes_nothing() -> None:
    with compute_threads(2):
        assert torch.get_num_threads() == 2
        with compute_threads(None):
            assert torch.get_num_threads() == 2
        with one_thread(), one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 3
    assert not [each for each in threading.enumerate() if each.name.startswith("qwodel-")]


def test_a_system_without_threads_to_spare_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(ResourceError, match="threads"), one_thread():
            pass
    assert torch.get_num_threads() == 3
