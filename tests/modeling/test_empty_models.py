"""Models without weights: what accelerate and transformers would build, unseen by other threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from qwodel.modeling.empty_models import (
    _Creating,
    empty_transformers_model,
    parameters_on_meta,
    tie_weights,
)

from .tiny_models import _SMALL, ARCHITECTURES

EXTRA: dict[str, tuple[str, str, dict[str, Any]]] = {
    "asks-for-default": ("XGLMForCausalLM", "XGLMConfig", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}),
    "draws": ("DiffLlamaForCausalLM", "DiffLlamaConfig", {}),
    "copies-its-config": ("PegasusForCausalLM", "PegasusConfig", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}),
    "integers-divided": ("GPTJForCausalLM", "GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "own-dtype": ("MambaForCausalLM", "MambaConfig", {}),
    "scaled-embeddings": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 8}),
}  # fmt: skip
ALL = ARCHITECTURES | EXTRA


def config_of(name: str) -> Any:
    _, config_class, extra = ALL[name]
    return getattr(transformers, config_class)(**_SMALL | extra)


def described(model: Any) -> tuple[Any, Any, Any]:
    parameters = {
        name: (each.dtype, each.shape, each.device.type, each.requires_grad)
        for name, each in model.named_parameters(remove_duplicate=False)
    }
    dtypes = {name: each.config.dtype for name, each in model.named_modules() if hasattr(each, "config")}
    return parameters, dtypes, dict(model.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_it_is_what_others_build_with_process_wide_switches(name: str, dtype: torch.dtype) -> None:
    cls = getattr(transformers, ALL[name][0])
    with init_empty_weights(include_buffers=False):
        *expected, buffers = described(cls._from_config(config_of(name), dtype=dtype))
    drawn = torch.get_rng_state()
    *found, ours = described(empty_transformers_model(cls, config_of(name), dtype))
    assert found == expected
    assert all(device == "meta" for _, _, device, _ in found[0].values())
    assert ours.keys() == buffers.keys()
    for key, buffer in buffers.items():
        assert ours[key].dtype == buffer.dtype, key
        assert torch.equal(ours[key], buffer), key
    assert torch.equal(torch.get_rng_state(), drawn), "the user's generator was drawn from"
    assert torch.get_default_dtype() == torch.float32


def test_layers_that_another_thread_builds_are_its_own() -> None:
    """It builds while this one does, for certain: from inside the constructor."""
    found: list[nn.Linear] = []

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(4, 4)
            thread = threading.Thread(target=lambda: found.append(nn.Linear(4, 4)))
            thread.start()
            thread.join()
            self.register_buffer("table", torch.arange(4) / 3)

    register = nn.Module.register_parameter
    with parameters_on_meta():
        built = Slow()
        assert nn.Module.register_parameter is register
    assert built.own.weight.is_meta
    assert isinstance(built.table, torch.Tensor)
    assert not built.table.is_meta
    assert found[0].weight.device.type == "cpu"
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_a_bf16_model_does_not_make_others_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.Tensor] = []
    build = transformers.LlamaModel.__init__

    def slow(self: Any, config: Any) -> None:
        thread = threading.Thread(target=lambda: found.extend([nn.Linear(4, 4).weight, torch.ones(1) / 3]))
        thread.start()
        thread.join()
        build(self, config)

    monkeypatch.setattr(transformers.LlamaModel, "__init__", slow)
    model = empty_transformers_model(transformers.LlamaForCausalLM, config_of("llama"), torch.bfloat16)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    assert [each.dtype for each in found] == [torch.float32, torch.float32]


def test_attributes_of_a_parameter_stay() -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
            weight.note = "kept"  # type: ignore[attr-defined]
            self.weight, self.nothing = weight, nn.Parameter(torch.empty(0))
            self.register_parameter("absent", None)

    with parameters_on_meta():
        built = Marked()
    assert built.weight.is_meta
    assert built.weight.note == "kept"  # type: ignore[attr-defined]
    assert not built.weight.requires_grad
    assert built.absent is None


def test_weights_are_tied_while_the_user_loads_another_model() -> None:
    from transformers.initialization import no_tie_weights

    model = transformers.LlamaForCausalLM(config_of("llama-tied"))
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    loading, loaded = threading.Event(), threading.Event()

    def load() -> None:
        with no_tie_weights():  # what from_pretrained does
            loading.set()
            loaded.wait(60)

    thread = threading.Thread(target=load)
    thread.start()
    assert loading.wait(60)
    threading.Timer(0.1, loaded.set).start()
    tie_weights(model)
    thread.join()
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    "create",
    [
        lambda: torch.ones(2),
        lambda: torch.tensor([0.1, 2]),
        lambda: torch.tensor([1, 2]),
        lambda: torch.tensor([0.1], dtype=torch.float64),
        lambda: torch.tensor(numpy.float32(0.1)),
        lambda: torch.full((2,), 1 / 3),
        lambda: torch.arange(0, 1001, 7) / 3,
        lambda: torch.arange(0, 4) * 0.1,
        lambda: 10000.0 ** (torch.arange(0, 1001, 2) / 1001),
        lambda: torch.where(torch.arange(3) > 1, 0.1, 0.2),
        lambda: torch.arange(3).float() / 3,
        lambda: torch.arange(3).to(torch.float32),
        lambda: torch.linspace(0, 1, 5),
        lambda: torch.arange(4).sqrt(),
        lambda: torch.zeros_like(torch.arange(3)),
        lambda: torch.outer(torch.arange(3), torch.ones(3)),
        lambda: torch.nn.functional.pad(torch.ones(3), (1, 1)),
    ],
)
def test_numbers_are_those_of_another_default_dtype(create: Callable[[], torch.Tensor]) -> None:
    with _Creating(torch.bfloat16):
        found = create()
    torch.set_default_dtype(torch.bfloat16)
    try:
        expected = create()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
