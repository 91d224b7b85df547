"""What the worker process answers, by task; it travels as JSON."""

from __future__ import annotations

from typing import TypedDict

__all__ = ["CollectedMatrix", "ForwardPass", "LoadedModel", "SpokenAnswer"]


class LoadedModel(TypedDict):
    """What llama.cpp says of a model it has loaded and run; ids and sizes are numbers of tokens."""

    description: str
    parameters: int
    vocabulary: int
    bos: int
    eos: int
    context_length: int
    chat_template: bool
    probe_tokens: list[int]
    probe_text: str
    forward_tokens: int


class CollectedMatrix(TypedDict):
    """Size of an importance matrix, and what it was computed on."""

    entries: int
    chunks: int
    chunk_size: int
    tokens: int


class ForwardPass(TypedDict):
    """Whether the logits of a tiny model are finite numbers."""

    finite: bool


class SpokenAnswer(TypedDict):
    """A greedy answer, and the tokens a second it came with."""

    answer: str
    speed: float
