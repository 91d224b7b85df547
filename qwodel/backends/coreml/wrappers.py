"""Modules that trace to what coremltools converts, around models of transformers.

transformers' own masks and caches trace to operators that do not convert, so a wrapper gives
masks made by plain arithmetic from a buffer of positions, explicit position ids, and a cache
that writes to buffers. Rotary angles are tables: computed in float16 on the device, the angle of
a late position would be off by a tenth of a radian.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qwodel.backends.coreml.models import ModelKind

__all__ = [
    "PAST",
    "TOKENS",
    "Input",
    "Output",
    "State",
    "Traceable",
    "outputs_of",
    "wrap_decoder",
    "wrap_encoder",
    "wrap_vision",
]

Tensor = torch.Tensor
_BLOCKED = -1e4  # an additive mask that float16 holds
TOKENS = "tokens"
PAST = "past and new tokens"


@dataclass(frozen=True, slots=True)
class Input:
    """An input of the package; a dimension given as text is the number of tokens of that kind."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    description: str


@dataclass(frozen=True, slots=True)
class Output:
    """An output of the package; ``per_token`` ones have the tokens in their second dimension."""

    name: str
    description: str
    per_token: bool = True


@dataclass(frozen=True, slots=True)
class State:
    """A Core ML state, backed by a buffer of the traced module."""

    name: str
    shape: tuple[int, ...]


@dataclass
class Traceable:
    """A module whose ``forward`` takes ``inputs`` in order and returns ``outputs``."""

    kind: ModelKind
    module: torch.nn.Module
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    states: tuple[State, ...] = ()


_NEXT = Output("logits", "Scores of the next token after each token: [batch, tokens, vocabulary].")
_CLASSES = Output("logits", "Scores of the classes: [batch, classes].", per_token=False)
_FEATURES = Output("last_hidden_state", "Hidden states.", per_token=False)
_HEADS = (
    (r"ForQuestionAnswering$", (Output("start_logits", "Scores of each token to be the answer's first."),
                                Output("end_logits", "Scores of each token to be the answer's last."))),
    (r"ForSequenceClassification$", (_CLASSES,)),
    (r"ForTokenClassification$", (Output("logits", "Scores of the classes of each token: [batch, tokens, classes]."),)),
    (r"ForMaskedLM$", (Output("logits", "Scores of each token: [batch, tokens, vocabulary]."),)),
    (r"", (Output("last_hidden_state", "Hidden states of each token: [batch, tokens, hidden]."),)),
)  # fmt: skip


def outputs_of(kind: ModelKind, model: torch.nn.Module) -> tuple[Output, ...]:
    """Return what a model of this kind and class gives."""
    name = type(model).__name__
    if kind is ModelKind.DECODER:
        return (_NEXT,)
    if kind is ModelKind.VISION:
        return (_CLASSES if name.endswith("ForImageClassification") else _FEATURES,)
    return next(outputs for pattern, outputs in _HEADS if re.search(pattern, name))


_IDS = Input("input_ids", ("batch", TOKENS), "int32", "Token ids, padded on the right.")
_MASK = Input("attention_mask", ("batch", TOKENS), "int32", "1 for tokens, 0 for padding.")
_PAST_MASK = Input(
    "attention_mask",
    ("batch", PAST),
    "int32",
    "1 for each token so far, the new ones included; its length says how many there are.",
)


class _RotaryTable(torch.nn.Module):
    """Stands for a model's rotary embedding: the same cosines and sines, looked up by position."""

    def __init__(self, rotary: torch.nn.Module, length: int, layer_types: list[str | None]) -> None:
        super().__init__()
        positions, like = torch.arange(length)[None], torch.zeros(1, length, 1)
        self._names: dict[str | None, str] = {}
        for index, layer_type in enumerate(layer_types):
            extra = () if layer_type is None else (layer_type,)
            cos, sin = rotary(like, positions, *extra)
            self._names[layer_type] = f"table_{index}"
            self.register_buffer(f"table_{index}_cos", cos[0].clone(), persistent=False)
            self.register_buffer(f"table_{index}_sin", sin[0].clone(), persistent=False)

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        name = self._names[layer_type]
        return getattr(self, f"{name}_cos")[position_ids], getattr(self, f"{name}_sin")[position_ids]


def _tabulate_rotary(model: torch.nn.Module, length: int) -> None:
    """Replace every rotary embedding that computes angles from positions by tables of ``length`` rows."""
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if not any(buffer.endswith("inv_freq") for buffer, _ in child.named_buffers(recurse=False)):
                continue
            parameters = inspect.signature(child.forward).parameters
            if "position_ids" not in parameters:
                continue
            layer_types: list[str | None] = [None]
            if "layer_type" in parameters:
                layer_types = sorted(set(model.config.layer_types))  # type: ignore[union-attr, arg-type]
            setattr(owner, name, _RotaryTable(child, length, layer_types))


class _Decoder(torch.nn.Module):
    """Token ids and a padding mask → logits of every token."""

    positions: Tensor

    def __init__(self, model: torch.nn.Module, length: int) -> None:
        super().__init__()
        self.model = model
        self._layer_types, self._window = _attention(model.config, length)
        self.register_buffer("positions", torch.arange(length, dtype=torch.int32), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = self.positions[: input_ids.shape[1]]
        return self._logits(input_ids, attention_mask, positions, positions, use_cache=False)

    def _logits(
        self, input_ids: Tensor, attention_mask: Tensor, queries: Tensor, keys: Tensor, **cache: Any
    ) -> Tensor:
        output = self.model(
            input_ids=input_ids,
            attention_mask=self._masks(attention_mask, queries, keys),
            position_ids=queries[None].expand(input_ids.shape[0], -1),
            **cache,
        )
        logits: Tensor = output.logits
        return logits

    def _masks(self, attention_mask: Tensor, queries: Tensor, keys: Tensor) -> Tensor | dict[str, Tensor]:
        distance = queries[:, None] - keys[None, :]
        padding = 1.0 - attention_mask[:, None, None, :].to(torch.float32)
        full = ((distance < 0).to(torch.float32)[None, None] + padding) * _BLOCKED
        if self._window is None:
            return full
        sliding = full + (distance >= self._window).to(torch.float32)[None, None] * _BLOCKED
        if not self._layer_types:
            return sliding
        return {kind: sliding if kind == "sliding_attention" else full for kind in self._layer_types}


def _attention(config: Any, length: int) -> tuple[tuple[str, ...], int | None]:
    """Return the kinds of attention layers and the sliding window, where a window is shorter than ``length``."""
    kinds = tuple(sorted(set(getattr(config, "layer_types", None) or ())))
    window = getattr(config, "sliding_window", None)
    if window is None or window >= length or not getattr(config, "use_sliding_window", True):
        return (), None
    if kinds and "sliding_attention" not in kinds:
        return (), None
    return kinds, int(window)


class _BufferCache:
    """The part of transformers' cache that attention layers use, over buffers that become states."""

    is_compileable = False

    def __init__(self, owner: torch.nn.Module, begin: int, end: int) -> None:
        self._owner, self._begin, self._end = owner, begin, end

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values ``[batch, heads, tokens, dim]``; return all so far."""
        result = []
        for name, new in (("keys", keys), ("values", values)):
            buffer = getattr(self._owner, f"{name}_{layer_idx}")
            buffer[:, :, self._begin : self._end, :] = new
            result.append(buffer[:, :, : self._end, :])
        return result[0], result[1]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return self._begin


class _StatefulDecoder(_Decoder):
    """New token ids and a mask over all tokens so far → logits of the new ones; keys and values stay inside."""

    def __init__(self, model: torch.nn.Module, length: int, shapes: list[tuple[int, ...]]) -> None:
        super().__init__(model, length)
        self._layers = len(shapes)
        for layer, shape in enumerate(shapes):
            for name in ("keys", "values"):
                self.register_buffer(f"{name}_{layer}", torch.zeros(shape), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        end = attention_mask.shape[1]
        begin = end - input_ids.shape[1]
        return self._logits(
            input_ids,
            attention_mask,
            self.positions[begin:end],
            self.positions[:end],
            past_key_values=_BufferCache(self, begin, end),
            use_cache=True,
        )


def wrap_decoder(model: torch.nn.Module, *, length: int, batch: int, stateful: bool) -> Traceable:
    """Wrap a causal language model; its rotary embeddings become tables.

    Args:
        model: a model of transformers; changed.
        length: most tokens.
        batch: sequences at a time.
        stateful: keep keys and values in states.
    """
    _use_eager_attention(model)
    states: tuple[State, ...] = ()
    if stateful:
        shapes = list(_cache_shapes(model, batch, length))
        module: torch.nn.Module = _StatefulDecoder(model, length, shapes)
        states = tuple(
            State(f"{name}_{layer}", shape)
            for layer, shape in enumerate(shapes)
            for name in ("keys", "values")
        )
    else:
        module = _Decoder(model, length)
    _tabulate_rotary(model, length)
    inputs = (_IDS, _PAST_MASK if stateful else _MASK)
    return Traceable(ModelKind.DECODER, module.eval(), inputs, outputs_of(ModelKind.DECODER, model), states)


@torch.no_grad()
def _cache_shapes(model: torch.nn.Module, batch: int, length: int) -> Iterator[tuple[int, ...]]:
    """Shapes of each layer's keys, learned from a token: heads and their width differ between models."""
    cache = model(input_ids=torch.zeros(batch, 1, dtype=torch.long), use_cache=True).past_key_values
    for layer in cache.layers:
        _, heads, _, width = layer.keys.shape
        if layer.values.shape[-1] != width:
            raise ValueError("keys and values of different width")
        yield batch, heads, length, width


def _use_eager_attention(model: torch.nn.Module) -> None:
    setter = getattr(model, "set_attn_implementation", None)
    if setter is not None:
        setter("eager")


class _Encoder(torch.nn.Module):
    """Token ids and a padding mask → hidden states, or a task head's scores."""

    positions: Tensor

    def __init__(self, model: torch.nn.Module, length: int, outputs: int) -> None:
        super().__init__()
        self.model = model
        self._outputs = outputs
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        self.register_buffer(
            "positions", torch.arange(length, dtype=torch.int32) + _first_position(model), persistent=False
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        arguments: dict[str, Any] = {}
        if "position_ids" in self._accepts:
            positions = self.positions[: input_ids.shape[1]]
            arguments["position_ids"] = positions[None].expand(input_ids.shape[0], -1)
        if "token_type_ids" in self._accepts:
            zeros = torch.zeros_like(input_ids)
            arguments["token_type_ids"] = zeros if token_type_ids is None else token_type_ids
        blocked = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * _BLOCKED
        found = self.model(input_ids=input_ids, attention_mask=blocked, return_dict=False, **arguments)
        return found[0] if self._outputs == 1 else tuple(found[: self._outputs])


def _first_position(model: torch.nn.Module) -> int:
    """RoBERTa and its kin count positions from ``padding_idx + 1``."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids") and hasattr(module, "padding_idx"):
            return int(module.padding_idx) + 1  # type: ignore[arg-type]
    return 0


def wrap_encoder(model: torch.nn.Module, *, length: int, token_type_ids: bool) -> Traceable:
    """Wrap an encoder or its task head. Arguments as for :func:`wrap_decoder`."""
    _use_eager_attention(model)
    _tabulate_rotary(model, length)
    inputs: tuple[Input, ...] = (_IDS, _MASK)
    if token_type_ids:
        inputs += (
            Input("token_type_ids", ("batch", TOKENS), "int32", "0 for the first text, 1 for the second."),
        )
    outputs = outputs_of(ModelKind.ENCODER, model)
    return Traceable(ModelKind.ENCODER, _Encoder(model, length, len(outputs)).eval(), inputs, outputs)


class _Vision(torch.nn.Module):
    """Pixels 0 … 255 → scores or hidden states; the processor's normalization is inside."""

    factor: Tensor
    offset: Tensor

    def __init__(self, model: torch.nn.Module, scale: float, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        # (x · scale − mean) / std
        self.register_buffer("factor", (scale / std).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("offset", (-mean / std).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.model(pixel_values=image * self.factor + self.offset, return_dict=False)[0]
        return found


def wrap_vision(
    model: torch.nn.Module, *, shape: tuple[int, ...], scale: float, mean: Tensor, std: Tensor
) -> Traceable:
    """Wrap a vision model with the normalization ``(pixels · scale − mean) / std`` inside.

    Args:
        model: takes ``pixel_values`` ``[1, channels, height, width]``.
        shape: of the image, as above.
        scale: factor of the pixels 0 … 255.
        mean: a value a channel, after scaling.
        std: likewise.
    """
    _use_eager_attention(model)
    kind = {3: "image_rgb", 1: "image_grayscale"}.get(shape[1], "float32")
    image = Input("image", shape, kind, f"Image of {shape[3]} × {shape[2]} pixels, values 0 to 255.")
    return Traceable(
        ModelKind.VISION,
        _Vision(model, scale, mean, std).eval(),
        (image,),
        outputs_of(ModelKind.VISION, model),
    )
