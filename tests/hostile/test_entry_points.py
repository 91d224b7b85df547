"""Whatever is in a file, what comes out is a typed error, or a result."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwodel.exceptions import QuantizationError
from tests.hostile.entry_points import ENTRY_POINTS
from tests.hostile.weight_files import Attempt

CASES = 300


@pytest.mark.parametrize("prepare", ENTRY_POINTS.values(), ids=list(ENTRY_POINTS))
def test_only_typed_errors_come_out(prepare: Callable[[Path], Attempt], tmp_path: Path) -> None:
    attempt = prepare(tmp_path)
    refused = 0

    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, (1 << 32) - 1))
    def case(seed: int) -> None:
        nonlocal refused
        try:
            attempt(random.Random(seed))
        except QuantizationError:
            refused += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case()
    # The damage is real: a good part of it is noticed.
    assert refused > CASES / 5
