from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwodel.exceptions import Cancelled
from qwodel.progress import STAGES, Progress

EVENTS = st.lists(st.tuples(st.sampled_from(STAGES[:-1]), st.floats(-1, 3), st.floats(0, 2)), max_size=30)


@given(EVENTS, st.dictionaries(st.sampled_from(STAGES[:-1]), st.floats(0, 10)))
def test_percent_never_falls_and_reaches_100_exactly_once(
    events: list[tuple[str, float, float]], weights: dict[str, float]
) -> None:
    seen: list[int] = []
    progress = Progress(lambda percent, stage, message: seen.append(percent), weights)
    for stage, done, total in events:
        progress.stage(stage)
        progress.update(done, total)
    progress.complete()
    assert seen == sorted(seen)
    assert seen.count(100) == 1
    assert seen[-1] == 100
    assert all(0 <= percent <= 100 for percent in seen)


def test_percent_follows_work_within_weighted_stages() -> None:
    seen: list[tuple[int, str]] = []
    progress = Progress(
        lambda percent, stage, _: seen.append((percent, stage)), {"convert": 1, "quantize": 3}
    )
    progress.stage("convert")
    progress.update(1, 2)
    progress.stage("quantize")
    progress.update(100, 300)
    assert seen == [(0, "convert"), (12, "convert"), (25, "quantize"), (50, "quantize")]


def test_a_raising_callback_becomes_cancelled_with_its_cause() -> None:
    def stop(percent: int, stage: str, message: str) -> None:
        raise RuntimeError("user pressed stop")

    with pytest.raises(Cancelled, match="user pressed stop") as caught:
        Progress(stop, {"quantize": 1}).stage("quantize")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_callback_that_raises_at_100_cancels_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def stop(percent: int, stage: str, message: str) -> None:
        raise RuntimeError("too late")

    Progress(stop).complete()
    assert "after the model was published" in caplog.text


def test_unknown_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown stage"):
        Progress(None).stage("complete")
    with pytest.raises(ValueError, match="unknown stages"):
        Progress(None, {"cooking": 1})
