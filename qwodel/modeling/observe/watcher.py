"""Hooks on layers, and the inputs that they hand on.

Linear layers, Conv1D, convolutions, routers: anything that is called with one tensor. Fused experts,
which keep the weights of all experts in one parameter, are followed expert by expert through their
routing, or taken for one layer that reads all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import nn

from qwodel.modeling.observe.layers import LayerId, expert_inputs, first_input, is_fused_experts

__all__ = ["Reading", "Sink", "Watcher"]


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What a layer is called with.

    Attributes:
        layer: the module's name.
        module: the layer.
        inputs: the very tensor, ``[..., N]`` of a linear layer: layers that share one get the same object.
        mask: tokens that count, ``[batch, tokens]``; ``None`` where all do.
        parameter: which of its weights reads.
        expert: which of fused experts reads.
    """

    layer: str
    module: nn.Module
    inputs: torch.Tensor
    mask: torch.Tensor | None = None
    parameter: str = "weight"
    expert: int | None = None

    @property
    def id(self) -> LayerId:
        """The parameter's full name, and the expert."""
        return f"{self.layer}.{self.parameter}", self.expert

    def rows(self) -> torch.Tensor:
        """The vectors of tokens that count, ``[T, N]``."""
        inputs = self.inputs.detach()
        if self.mask is not None:
            if inputs.shape[:-1] == self.mask.shape:
                inputs = inputs[self.mask.to(inputs.device)]
            elif inputs.shape[:-1] == (self.mask.numel(),):
                inputs = inputs[self.mask.reshape(-1).to(inputs.device)]
        return inputs.reshape(-1, inputs.shape[-1])


class Sink(Protocol):
    """Takes in what layers read."""

    def take(self, reading: Reading) -> None:
        """Take in one input, before the layer computes with it; it may change after."""

    def forget(self) -> None:
        """Let go of tensors of the batch that has ended."""


class Watcher:
    """Hands the inputs of layers to sinks while it is entered; it may be entered again.

    Args:
        layers: the modules to watch, by name.
        sinks: take in each input, in this order.
        experts_apart: hand on what each of fused experts reads, in place of what all of them do.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *sinks: Sink, experts_apart: bool = False) -> None:
        self._layers, self._sinks, self._apart = layers, sinks, experts_apart
        self._mask: torch.Tensor | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in self._layers.items():
            see = self._experts if self._apart and is_fused_experts(module) else self._whole
            self._hooks.append(module.register_forward_pre_hook(partial(see, name), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.batch()

    def batch(self, mask: torch.Tensor | None = None) -> None:
        """Stand between two batches: what sinks hold of the last one's tensors is let go.

        Args:
            mask: ``[batch, tokens]``; tokens of the next batch where it is zero do not count, for sinks
                that heed it.
        """
        self._mask = None if mask is None or bool((mask != 0).all()) else mask != 0
        for sink in self._sinks:
            sink.forget()

    def _whole(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hand_on(Reading(name, module, first_input(args, kwargs, name), self._mask))

    def _experts(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for parameter, expert, inputs in expert_inputs(module, args, kwargs):
            self._hand_on(Reading(name, module, inputs, None, parameter, expert))

    def _hand_on(self, reading: Reading) -> None:
        for sink in self._sinks:
            sink.take(reading)
