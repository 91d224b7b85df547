"""Learning-rate schedules of learned rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qwodel.exceptions import ConfigurationError, did_you_mean

__all__ = ["Schedule", "ScheduleName", "ScheduleOptions"]

ScheduleName = Literal["adaptive", "plateau", "exponential"]

_GROWTH = 1.25  # adaptive: after a step that helped


@dataclass(frozen=True, slots=True)
class ScheduleOptions:
    """How the learning rate moves.

    Attributes:
        lr_schedule: ``"adaptive"`` grows after a step that helps, or is too short to move a code,
            and shrinks after one that does not; ``"plateau"`` only shrinks; ``"exponential"`` shrinks every step.
        lr: the first learning rate: for ``original`` the share of the projected error that a
            step takes back, for the others grid steps a step.
        lr_gamma: factor of every step (exponential).
        lr_factor: factor after a failed step (adaptive, plateau).
        lr_patience: failed steps in a row that are forgiven (adaptive, plateau).
        lr_cooldown: steps after a reduction in which failures do not count.
        lr_shape_influence: 0 to 1; how far ``lr_factor`` moves to lr_factor^√aspect, so
            that elongated matrices are damped sooner.
        lr_max: what the adaptive schedule does not exceed.
    """

    lr_schedule: ScheduleName = "adaptive"
    lr: float = 0.01
    lr_gamma: float = 0.99
    lr_factor: float = 0.5
    lr_patience: int = 0
    lr_cooldown: int = 0
    lr_shape_influence: float = 0.0
    lr_max: float = 1.0

    def __post_init__(self) -> None:
        names = get_args(ScheduleName)
        if self.lr_schedule not in names:
            raise ConfigurationError(
                f"no learning-rate schedule is called {self.lr_schedule!r}; there are {', '.join(names)}",
                hint=did_you_mean(str(self.lr_schedule), names),
            )
        if not self.lr > 0 or not self.lr_max > 0:
            raise ConfigurationError(f"lr and lr_max must be positive, not {self.lr} and {self.lr_max}")
        for name in ("lr_gamma", "lr_factor"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is a factor between 0 and 1, not {getattr(self, name)}")
        if self.lr_patience < 0 or self.lr_cooldown < 0:
            raise ConfigurationError("lr_patience and lr_cooldown count steps: they cannot be negative")
        if not 0 <= self.lr_shape_influence <= 1:
            raise ConfigurationError(f"lr_shape_influence lies in [0, 1], not {self.lr_shape_influence}")


class Schedule:
    """The learning rate of one matrix, step by step.

    Attributes:
        lr: the learning rate of the next step.
    """

    def __init__(self, options: ScheduleOptions, shape: tuple[int, ...]) -> None:
        self.options = options
        self.lr = options.lr
        aspect = max(shape) / max(1, min(shape))
        blend = options.lr_shape_influence
        self._factor = (1 - blend) * options.lr_factor + blend * options.lr_factor ** (aspect**0.5)
        self._ceiling = max(options.lr, options.lr_max)
        self._failures = 0
        self._cooling = 0

    def update(self, improved: bool) -> None:
        """Move the rate after a step that did or did not lower the best loss."""
        if self.options.lr_schedule == "exponential":
            self.lr *= self.options.lr_gamma
            return
        if improved:
            self._failures = 0
            if self.options.lr_schedule == "adaptive":
                self.lr = min(self.lr * _GROWTH, self._ceiling)
        elif self._cooling:
            self._cooling -= 1
        else:
            self._failures += 1
            if self._failures > self.options.lr_patience:
                self.lr *= self._factor
                self._failures, self._cooling = 0, self.options.lr_cooldown
