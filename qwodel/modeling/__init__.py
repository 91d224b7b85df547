"""What must know a network's shape: running it block by block, what its layers see, and which feeds which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwodel.checkpoint.rounding.statistics import StatisticsFile
    from qwodel.modeling.collect import collect_statistics

__all__ = ["StatisticsFile", "collect_statistics"]

_HOME = {
    "StatisticsFile": "qwodel.checkpoint.rounding.statistics",
    "collect_statistics": "qwodel.modeling.collect",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qwodel.modeling' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
