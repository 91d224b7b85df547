from __future__ import annotations

import pytest
import torch

from qwodel.exceptions import ConfigurationError
from qwodel.segquant import AllSampler, NormalSampler, TimestepSampler, UniformSampler


def test_all_calls() -> None:
    assert list(AllSampler().choose(4, 0)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("count", "calls", "expected"),
    [(5, 21, [0, 5, 10, 15, 20]), (2, 7, [0, 6]), (1, 7, [3]), (9, 4, [0, 1, 2, 3]), (3, 1, [0])],
)
def test_uniform_distances(count: int, calls: int, expected: list[int]) -> None:
    assert UniformSampler(timestep_per_sample=count).choose(calls, 3) == expected


def test_normal_odds() -> None:
    sampler = NormalSampler(timestep_per_sample=6, mean=0.25, std=0.1, seed=5)
    drawn = [sampler.choose(41, run) for run in range(200)]
    assert all(calls == sorted(set(calls)) and len(calls) == 6 for calls in drawn)
    assert drawn[0] == sampler.choose(41, 0)
    assert len({tuple(calls) for calls in drawn}) > 150
    numbers = torch.tensor(drawn, dtype=torch.float64)
    assert float(numbers.mean()) == pytest.approx(10, abs=0.5)
    assert 3.5 < float(numbers.std()) < 5.5  # without replacement a little more than 4
    assert NormalSampler().choose(1, 0) == [0]
    assert NormalSampler(timestep_per_sample=9).choose(3, 0) == [0, 1, 2]


def test_given_timesteps() -> None:
    assert TimestepSampler(timesteps=(4, 0, -1)).choose(6, 0) == [0, 4, 5]
    with pytest.raises(ConfigurationError, match="a run has 4 calls; there is none with number 4"):
        TimestepSampler(timesteps=(0, 4)).choose(4, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: UniformSampler(timestep_per_sample=0),
        lambda: AllSampler(max_timestep=0),
        lambda: AllSampler(sample_size=-1),
        lambda: NormalSampler(mean=1.5),
        lambda: NormalSampler(std=0.0),
        lambda: TimestepSampler(timesteps=()),
    ],
)
def test_settings_out_of_range(make: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make()  # type: ignore[operator]
    assert caught.value.hint
