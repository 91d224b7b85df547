"""Ways around defects of llm-compressor, each in force only where the defect shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

__all__ = ["without_accelerator"]


@contextmanager
def without_accelerator() -> Iterator[None]:
    """Let AWQ run on a machine without an accelerator.

    0.14.0.1 pins cached activations, and sums over processes on "the current accelerator", whether
    or not there is one. Each step is tried first; where it works, nothing is replaced.
    """
    with ExitStack() as stack:
        if _pinning_fails():
            from llmcompressor.pipelines.cache import IntermediatesCache

            stack.enter_context(patch.object(IntermediatesCache, "pin_memory", _leave_unpinned))
        if _has_no_accelerator():
            from llmcompressor.modifiers.transform.awq import base

            if hasattr(base, "_allreduce_data_sum"):
                stack.enter_context(patch.object(base, "_allreduce_data_sum", _sum_over_processes))
        yield


def _pinning_fails() -> bool:
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache, IntermediateValue

    cache = IntermediatesCache([{"probe": IntermediateValue(torch.zeros(1), None)}], None)
    try:
        cache.pin_memory(0)
    except RuntimeError:
        return True
    return False


def _leave_unpinned(*_: Any, **__: Any) -> None:
    """Pinned memory speeds up copies to a device; here is none."""


def _has_no_accelerator() -> bool:
    import torch

    return torch.accelerator.current_accelerator() is None


def _sum_over_processes(data: list[Any]) -> list[Any]:
    import torch.distributed as dist

    for tensor in data:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return data
