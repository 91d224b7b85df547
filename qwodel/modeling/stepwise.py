"""Running many batches through a model in step: all of them through one unit, then through the next.

Each batch's forward pass is a coroutine that stops whenever it comes to a unit. So a unit's weights
are needed for a short while only, whatever the model does between its units: masks, positions,
encoder outputs and residual streams are the model's own business, carried by its own code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Arrival", "run_in_step"]


class _Stop(BaseException):
    """Ends a forward pass that has come as far as it needs to; models do not catch it."""


@dataclass(slots=True)
class Arrival:
    """A batch that waits before a unit.

    Attributes:
        args, kwargs: what the model calls the unit with.
    """

    unit: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Visit = Callable[[nn.Module, Sequence[Arrival]], Iterator[Any]]
"""Takes a unit and the batches before it, and yields the unit's output for each of them in turn."""


def run_in_step(
    forward: Callable[[Any], Any], batches: Iterable[Any], units: Sequence[nn.Module], visit: Visit
) -> None:
    """Drive every batch through ``forward``, stopping all of them at each unit.

    A pass ends when every unit has been visited, so nothing behind the last unit is computed; units
    that the model never calls are simply not visited. A unit that the model calls several times is
    visited each time.

    Args:
        forward: runs the model on one batch.
        units: modules that ``forward`` calls, in any order.
        visit: called for each unit with all batches that wait before it.

    Raises:
        Exception: whatever ``forward`` or ``visit`` raises; all passes have ended then.
    """
    with _stopping(units):
        passes = [_Pass(forward, batch) for batch in batches]
        remaining = set(units)
        try:
            for each in passes:
                each.resume(None)
            while waiting := [each for each in passes if each.arrival]:
                unit = waiting[0].unit
                group = [each for each in waiting if each.unit is unit]
                outputs = visit(unit, [each.arrival for each in group if each.arrival])
                remaining.discard(unit)
                for each, output in zip(group, outputs, strict=True):
                    each.resume(output, last=not remaining)
        finally:
            for each in passes:
                each.stop()


class _Pass:
    """One forward pass in a thread of its own that runs only while the driver waits for it."""

    def __init__(self, forward: Callable[[Any], Any], batch: Any) -> None:
        self.arrival: Arrival | None = None
        self._forward, self._batch = forward, batch
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._answer: Any = None
        self._last = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = False

    @property
    def unit(self) -> nn.Module:
        """The unit it waits before."""
        assert self.arrival is not None
        return self.arrival.unit

    def resume(self, output: Any, *, last: bool = False) -> None:
        """Go on with the unit's output, until the next unit or the end; ``last`` ends it here."""
        self._answer, self._last, self.arrival = output, last, None
        self._hand_over()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def stop(self) -> None:
        """End the pass where it is."""
        if self._started and self._thread.is_alive():
            self._last = True
            self._hand_over()
            self._thread.join()

    def arrive(self, unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called from the pass's own thread: wait for the unit's output."""
        self.arrival = Arrival(unit, args, kwargs)
        self._back.release()
        self._go.acquire()
        if self._last:
            raise _Stop
        answer, self._answer = self._answer, None
        return answer

    def _hand_over(self) -> None:
        if self._started:
            self._go.release()
        else:
            self._started = True
            self._thread.start()
        self._back.acquire()

    def _run(self) -> None:
        _current.running = self
        try:
            # Whether gradients are on is a matter of the thread.
            with torch.no_grad():
                self._forward(self._batch)
        except _Stop:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.arrival = None
            self._batch = None
            self._back.release()


class _Current(threading.local):
    running: _Pass | None = None


_current = _Current()


@contextmanager
def _stopping(units: Sequence[nn.Module]) -> Iterator[None]:
    """Make each unit's ``forward`` wait for the driver; calls from the driver itself go through."""
    original = {unit: unit.forward for unit in units}

    def stop_at(unit: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            running = _current.running
            if running is None:
                return original[unit](*args, **kwargs)
            return running.arrive(unit, args, kwargs)

        return forward

    for unit in units:
        unit.forward = stop_at(unit)
    try:
        yield
    finally:
        for unit in units:
            del unit.forward
