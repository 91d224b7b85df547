"""Running many batches through a model in step: all of them through one unit, then through the next.

Each batch's forward pass is a coroutine (a greenlet) that stops whenever it comes to a unit. So a
unit's weights are needed for a short while only, whatever the model does between its units: masks,
positions, encoder outputs and residual streams are the model's own business, carried by its own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

__all__ = ["Arrival", "run_in_step"]


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
    forward: Callable[[Any], Any],
    batches: Iterable[Any],
    units: Sequence[nn.Module],
    visit: Visit,
    *,
    finish: bool = False,
) -> None:
    """Drive every batch through ``forward``, stopping all of them at each unit.

    Units that the model never calls are simply not visited. A unit that the model calls several times
    is visited each time. A visit may run in step through units within its own. Gradients are off.

    Args:
        forward: runs the model on one batch.
        units: modules that ``forward`` calls, in any order.
        visit: called for each unit with all batches that wait before it.
        finish: run every pass to its end; else it ends when every unit has been visited, and nothing
            behind the last unit is computed.

    Raises:
        Exception: whatever ``forward`` or ``visit`` raises; all passes have ended then.
    """
    run = object()
    with _stopping(units, run), torch.no_grad():
        passes = [_Pass(forward, batch, run) for batch in batches]
        remaining = set(units)
        try:
            for each in passes:
                each.go_on()
            while waiting := [each for each in passes if each.arrival]:
                unit = waiting[0].unit
                group = [each for each in waiting if each.unit is unit]
                outputs = visit(unit, [each.arrival for each in group if each.arrival])
                remaining.discard(unit)
                for each, output in zip(group, outputs, strict=True):
                    if remaining or finish:
                        each.go_on(output)
                    else:
                        each.stop()
        finally:
            for each in passes:
                each.stop()


class _Pass(greenlet):
    """One forward pass; what it raises is raised in the driver."""

    def __init__(self, forward: Callable[[Any], Any], batch: Any, owner: object) -> None:
        super().__init__(self._forward)
        self.owner = owner
        self.arrival: Arrival | None = None
        self._pending = (forward, batch)

    @property
    def unit(self) -> nn.Module:
        """The unit it waits before."""
        assert self.arrival is not None
        return self.arrival.unit

    def go_on(self, output: Any = None) -> None:
        """Run, with the output of the unit it waits before, until the next unit or the end."""
        self.arrival = None
        self.switch(output)

    def stop(self) -> None:
        """End the pass where it is."""
        self.arrival = None
        if not self.dead:
            self.throw(GreenletExit)

    def arrive(self, unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called by the pass itself: wait for the unit's output."""
        self.arrival = Arrival(unit, args, kwargs)
        del args, kwargs
        assert self.parent is not None
        return self.parent.switch()

    def _forward(self, _: Any) -> None:
        forward, batch = self._pending
        del self._pending
        forward(batch)


@contextmanager
def _stopping(units: Sequence[nn.Module], run: object) -> Iterator[None]:
    """Make each unit's ``forward`` wait for the driver of its run; calls from the driver itself go through."""
    original = {unit: unit.forward for unit in units}
    own = {unit: vars(unit).get("forward") for unit in units}

    def stop_at(unit: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            current = getcurrent()
            if isinstance(current, _Pass) and current.owner is run:
                return current.arrive(unit, args, kwargs)
            return original[unit](*args, **kwargs)

        return forward

    for unit in units:
        unit.forward = stop_at(unit)
    try:
        yield
    finally:
        for unit in units:
            del unit.forward
            if (before := own[unit]) is not None:
                unit.forward = before
