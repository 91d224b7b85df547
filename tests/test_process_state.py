"""What the process has only one of is found as it was, whatever the order in which threads come and go."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from transformers.utils import logging as transformers_messages

from qwodel.process_state import Exclusive, quiet_transformers, replaced, shared, without_warnings


def test_the_last_one_out_turns_a_shared_switch_back() -> None:
    """The order in which a plain save and restore leaves the switch turned: first in, first out."""
    state = {"value": "user's"}

    @shared
    @contextmanager
    def switched() -> Iterator[None]:
        before, state["value"] = state["value"], "ours"
        yield
        state["value"] = before

    first, second = switched(), switched()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert state["value"] == "ours"
    second.__exit__(None, None, None)
    assert state["value"] == "user's"
    with switched():
        assert state["value"] == "ours"
    assert state["value"] == "user's"


def test_a_switch_that_cannot_be_turned_leaves_the_count_right() -> None:
    tries = []

    @shared
    @contextmanager
    def failing() -> Iterator[None]:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("not now")
        yield

    with pytest.raises(OSError, match="not now"), failing():
        pass
    with failing():
        pass
    with failing():
        pass
    assert len(tries) == 3


def test_an_error_passes_and_the_switch_is_turned_back() -> None:
    before = list(warnings.filters)
    with pytest.raises(KeyError), without_warnings():
        raise KeyError
    assert warnings.filters == before


def test_warnings_filters_after_overlapping_threads() -> None:
    before, inside, leave = list(warnings.filters), threading.Event(), threading.Event()

    def other() -> None:
        with without_warnings():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with without_warnings():
        thread.start()
        inside.wait()
    leave.set()
    thread.join()
    assert warnings.filters == before


def test_transformers_speaks_again_afterwards() -> None:
    level, bars = transformers_messages.get_verbosity(), transformers_messages.is_progress_bar_enabled()
    with quiet_transformers(), quiet_transformers():
        assert transformers_messages.get_verbosity() == transformers_messages.ERROR
        assert not transformers_messages.is_progress_bar_enabled()
    assert transformers_messages.get_verbosity() == level
    assert transformers_messages.is_progress_bar_enabled() == bars


def test_exclusive_runs_follow_each_other_and_may_nest() -> None:
    run, events = Exclusive("test"), []
    started = threading.Event()

    def other() -> None:
        started.set()
        with run:
            events.append("other")

    thread = threading.Thread(target=other)
    with run, run:
        thread.start()
        started.wait()
        thread.join(0.05)
        events.append("first")
    thread.join()
    assert events == ["first", "other"]


def test_what_was_replaced_is_put_back() -> None:
    owner = SimpleNamespace(bar=1)
    with pytest.raises(ValueError, match="x"), replaced(owner, "bar", 2):
        assert owner.bar == 2
        raise ValueError("x")
    assert owner.bar == 1
