"""Ways around defects of llm-compressor, each in force only where the defect shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from qwodel.process_state import replaced

__all__ = ["own_weights", "part_ways", "without_accelerator"]


@contextmanager
def without_accelerator() -> Iterator[None]:
    """Let AWQ run on a machine without an accelerator.

    0.14.0.1 pins cached activations, and sums over processes on "the current accelerator", whether
    or not there is one. Each step is tried first; where it works, nothing is replaced.
    """
    with ExitStack() as stack:
        if _pinning_fails():
            from llmcompressor.pipelines.cache import IntermediatesCache

            stack.enter_context(replaced(IntermediatesCache, "pin_memory", _leave_unpinned))
        if _has_no_accelerator():
            from llmcompressor.modifiers.transform.awq import base

            if hasattr(base, "_allreduce_data_sum"):
                stack.enter_context(replaced(base, "_allreduce_data_sum", _sum_over_processes))
            from llmcompressor.modifiers.quantization.quantization import base as rounding

            # Shared out, the scales of CPU weights are not sent round; each process computes all.
            stack.enter_context(replaced(rounding, "is_distributed", bool))
        yield


def own_weights(model: Any) -> bool:
    """Give this process weights of its own where there is no accelerator, and return whether it did.

    Processes share offloaded weights, and each changes what it onloads in place. On a device that
    is a copy; on the CPU it is the shared memory itself, which every process would scale once.
    """
    import torch
    from compressed_tensors.offload import set_onload_device
    from compressed_tensors.offload.utils import as_single_threaded

    if not _has_no_accelerator():
        return False
    with as_single_threaded():
        set_onload_device(model, torch.device("cpu"))
    return True


def part_ways() -> ExitStack:
    """Leave the process group, and act as if alone until the returned stack closes.

    Each process has the whole result by then, and one of them saves it.
    """
    import torch.distributed as dist
    from compressed_tensors.offload.utils import as_single_threaded

    dist.barrier()
    dist.destroy_process_group()
    stack = ExitStack()
    stack.enter_context(as_single_threaded())
    return stack


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
