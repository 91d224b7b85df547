"""Recording what layers read while a model runs.

Layers that read the same tensor (q, k and v) share one sum. Fused experts, which keep the weights
of all experts in one parameter, are followed expert by expert through their routing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from qwodel.algorithms.gram import GramAccumulator
from qwodel.exceptions import ValidationError

__all__ = [
    "InputGroup",
    "InputRecorder",
    "LayerId",
    "first_input",
    "inputs_kept",
    "is_fused_experts",
    "is_linear",
    "layers_to_record",
]

LayerId = tuple[str, int | None]
"""A parameter's name and, where it holds many experts, the number of one."""

_RECENT = 16  # distinct inputs remembered during a pass; layers that share one come soon after another


def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies its input's last axis with one matrix called ``weight``."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_fused_experts(module: nn.Module) -> bool:
    """Whether the module holds experts as ``gate_up_proj`` and ``down_proj`` of three dimensions."""
    shapes = [getattr(getattr(module, name, None), "ndim", 0) for name in ("gate_up_proj", "down_proj")]
    return shapes == [3, 3] and hasattr(module, "act_fn")


@dataclass(slots=True)
class InputGroup:
    """Layers that read the same inputs, and the sum of those."""

    layers: list[LayerId]
    sums: GramAccumulator


@dataclass(slots=True)
class _Recent:
    tensor: torch.Tensor
    version: int
    group: InputGroup


@dataclass(slots=True)
class InputRecorder:
    """Sums up the inputs of layers while it is entered.

    Args:
        layers: linear and fused-expert modules by name.
        gram: sum XᵀX too.
        even: let no token count for more than the median one of its pass, by the length of its vector.
            Where a few tokens are a hundred times as long as the others, the sums would know only those.
        sources: what layers of the unquantized model read in the pass at hand, in place of what they
            read here; fill it before a pass, :meth:`end_pass` empties it.
        buffer: makes the ``[N, N]`` of zeros that a Gram matrix is summed in; in memory if not given.
    """

    layers: Mapping[str, nn.Module]
    gram: bool = True
    buffer: Callable[[int], torch.Tensor] | None = None
    even: bool = False
    sources: dict[LayerId, torch.Tensor] = field(default_factory=dict)
    _groups: dict[LayerId, InputGroup] = field(default_factory=dict)
    _recent: list[_Recent] = field(default_factory=list)
    _hooks: list[Any] = field(default_factory=list)

    def __enter__(self) -> Self:
        for name, module in self.layers.items():
            if is_fused_experts(module):
                hook = module.register_forward_pre_hook(partial(self._experts, name), with_kwargs=True)
            else:
                hook = module.register_forward_pre_hook(partial(self._linear, name), with_kwargs=True)
            self._hooks.append(hook)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._recent.clear()

    def end_pass(self) -> None:
        """Forget the tensors of the pass that has ended; call it after each forward pass."""
        self._recent.clear()
        self.sources.clear()

    def groups(self) -> tuple[InputGroup, ...]:
        """Every group that has seen something, in the order in which layers ran."""
        return tuple({id(group): group for group in self._groups.values()}.values())

    def seen(self) -> Mapping[LayerId, InputGroup]:
        """Layers with at least one input, in the order in which they first ran, and their groups."""
        return self._groups

    def add(self, layer: LayerId, inputs: torch.Tensor) -> None:
        """Take in what a layer reads, ``[..., N]``; the hooks of an entered recorder do.

        Raises:
            ValidationError: NaN or Inf, or another width than before.
        """
        try:
            self._sum(layer, inputs)
        except ValidationError as error:
            raise error.within(layer[0]) from error

    def _linear(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.add((f"{name}.weight", None), first_input(args, kwargs))

    def _sum(self, layer: LayerId, inputs: torch.Tensor) -> None:
        group = self._groups.get(layer)
        version = inputs._version  # noqa: SLF001  (a tensor changed in place is another input)
        same = next(
            (each for each in self._recent if each.tensor is inputs and each.version == version), None
        )
        if same is not None:
            if group is None:
                self._groups[layer] = same.group
                same.group.layers.append(layer)
            if self._groups[layer] is same.group:
                return
        if group is None:
            group = InputGroup([layer], self._accumulator(inputs.shape[-1]))
            self._groups[layer] = group
        elif group.layers[0] != layer:
            # What it shared until this pass it does not share any more.
            group.layers.remove(layer)
            group = InputGroup([layer], group.sums.copy())
            self._groups[layer] = group
        source = self.sources.get(layer)
        if source is not None and source.shape != inputs.shape:
            source = None
        if self.even:
            cut = _evening(inputs)
            evened = (inputs * cut).to(inputs.dtype)
            group.sums.add(evened, None if source is None else source * cut)
        else:
            group.sums.add(inputs, source)
        self._recent.append(_Recent(inputs, version, group))
        del self._recent[:-_RECENT]

    def _accumulator(self, columns: int) -> GramAccumulator:
        buffer = self.buffer(columns) if self.buffer and self.gram else None
        return GramAccumulator(columns, gram=self.gram, buffer=buffer)

    def _experts(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        hidden, chosen = given[0], given[1]
        flat = hidden.reshape(-1, hidden.shape[-1])
        for expert in range(module.gate_up_proj.shape[0]):
            tokens = (chosen == expert).any(dim=-1).nonzero().flatten()
            if not len(tokens):
                continue
            inputs = flat[tokens]
            self.add((f"{name}.gate_up_proj", expert), inputs)
            self.add((f"{name}.down_proj", expert), _between(module, inputs, expert))


@contextmanager
def inputs_kept(
    layers: Mapping[str, nn.Module], counts: Collection[int]
) -> Iterator[dict[LayerId, torch.Tensor]]:
    """Keep what linear layers read in one pass, where it is one of ``counts`` vectors."""
    kept: dict[LayerId, torch.Tensor] = {}

    def keep(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = first_input(args, kwargs)
        if inputs.numel() // max(inputs.shape[-1], 1) in counts:
            kept[f"{name}.weight", None] = inputs

    hooks = [
        module.register_forward_pre_hook(partial(keep, name), with_kwargs=True)
        for name, module in layers.items()
        if is_linear(module)
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What a linear layer is called with."""
    inputs: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    return inputs


def _evening(inputs: torch.Tensor) -> torch.Tensor:
    """What cuts vectors ``[..., N]`` longer than the median one to its length, fp32 ``[..., 1]``."""
    lengths = torch.linalg.vector_norm(inputs.float(), dim=-1, keepdim=True)
    cut: torch.Tensor = (lengths.median() / lengths.clamp_min(1e-30)).clamp_(max=1)
    return cut


def _between(module: Any, inputs: torch.Tensor, expert: int) -> torch.Tensor:
    """What an expert's down projection reads."""
    weight = module.gate_up_proj[expert]
    product = inputs @ (weight.T if weight.shape[1] == inputs.shape[1] else weight)
    if hasattr(module, "_apply_gate"):
        gated: torch.Tensor = module._apply_gate(product)  # noqa: SLF001  (the architecture's own gate)
        return gated
    gate, up = product.chunk(2, dim=-1)
    between: torch.Tensor = module.act_fn(gate) * up
    return between


def layers_to_record(model: nn.Module, parameters: Iterable[str]) -> dict[str, nn.Module]:
    """The linear and fused-expert modules of ``model`` that own one of ``parameters``, by name."""
    wanted = set(parameters)

    def owns(name: str, module: nn.Module) -> bool:
        if is_fused_experts(module):
            return bool(wanted & {f"{name}.gate_up_proj", f"{name}.down_proj"})
        return is_linear(module) and (f"{name}.weight" if name else "weight") in wanted

    return {name: module for name, module in model.named_modules() if owns(name, module)}
