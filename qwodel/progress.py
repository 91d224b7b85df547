"""Progress as work done: weighted stages in, ``callback(percent, stage, message)`` out.

The percentage never falls, reaches 100 exactly once (at ``complete``) and
moves with bytes, tensors, blocks or tokens, never with fixed marks. A callback
that raises cancels the run: the reporter turns whatever it raised into
:class:`~qwodel.exceptions.Cancelled`, and the layers above clean up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from qwodel.exceptions import Cancelled

__all__ = ["STAGES", "Progress", "ProgressCallback"]

ProgressCallback = Callable[[int, str, str], object]
"""``(percent 0..100, stage, message)``; the return value is ignored."""

STAGES = ("resolve", "convert", "calibrate", "quantize", "verify", "publish", "complete")
"""The stages a run passes through, in order; a run may skip some."""


class Progress:
    """Turns work done within weighted stages into one rising percentage.

    Args:
        callback: receives ``(percent, stage, message)``; ``None`` for silence.
        weights: expected share of wall time per stage, in any unit. Stages that
            are not named take no share; ``complete`` never has one.
    """

    def __init__(self, callback: ProgressCallback | None, weights: Mapping[str, float] | None = None) -> None:
        self._callback = callback
        self._starts: dict[str, float] = {}
        self._shares: dict[str, float] = {}
        self._stage = STAGES[0]
        self._percent = 0
        self._last: tuple[int, str, str] | None = None
        self.set_weights(weights or {})

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Replace the stage weights, as soon as the run knows which stages it has."""
        unknown = set(weights) - set(STAGES)
        if unknown:
            raise ValueError(f"unknown stages: {sorted(unknown)}")
        total = sum(weights.values()) or 1.0
        position = 0.0
        for stage in STAGES[:-1]:
            share = weights.get(stage, 0.0) / total
            self._starts[stage], self._shares[stage] = position, share
            position += share

    @property
    def percent(self) -> int:
        """The last percentage reported."""
        return self._percent

    def stage(self, stage: str, message: str = "") -> None:
        """Enter ``stage`` with nothing of it done yet."""
        if stage not in STAGES[:-1]:
            raise ValueError(f"unknown stage: {stage!r}")
        self._stage = stage
        self.update(0.0, 1.0, message)

    def update(self, done: float, total: float, message: str = "") -> None:
        """Report ``done`` of ``total`` units of the present stage.

        Raises:
            Cancelled: the callback raised.
        """
        fraction = min(max(done / total, 0.0), 1.0) if total > 0 else 1.0
        share = self._starts[self._stage] + self._shares[self._stage] * fraction
        # 100 belongs to complete() alone.
        self._percent = max(self._percent, min(int(share * 100 + 1e-9), 99))
        self._emit(self._percent, self._stage, message)

    def complete(self, message: str = "") -> None:
        """Report 100 %, once, after publishing: a callback that raises now has nothing left to cancel."""
        self._percent = 100
        if self._callback is None:
            return
        try:
            self._callback(100, STAGES[-1], message)
        except Exception:
            logging.getLogger("qwodel").exception(
                "the progress callback failed after the model was published"
            )

    def _emit(self, percent: int, stage: str, message: str) -> None:
        event = (percent, stage, message)
        if self._callback is None or event == self._last:
            return
        self._last = event
        try:
            self._callback(*event)
        except Exception as error:
            raise Cancelled(
                f"cancelled by the progress callback during {stage}: {error or type(error).__name__}"
            ) from error
