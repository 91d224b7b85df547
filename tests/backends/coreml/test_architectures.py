"""Every family of models, small and with random weights: proved, converted, evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from qwodel.backends.coreml import wrappers
from qwodel.exceptions import ConversionError
from tests.backends.coreml.runs import GROUPED, SMALL, Made, make

LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
DECODERS: dict[str, tuple[Any, Any]] = {
    "llama3": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**GROUPED, rope_parameters=LLAMA3_ROPE)),
    "qwen2": (hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**GROUPED)),
    "qwen3": (hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**GROUPED, head_dim=16)),
    "mistral": (hf.MistralForCausalLM, lambda: hf.MistralConfig(**GROUPED, sliding_window=24)),
    "gemma": (hf.GemmaForCausalLM, lambda: hf.GemmaConfig(**GROUPED, head_dim=16)),
    "gemma3": (hf.Gemma3ForCausalLM, lambda: hf.Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=24)),
    "phi": (hf.PhiForCausalLM, lambda: hf.PhiConfig(**SMALL)),
    "phi3": (hf.Phi3ForCausalLM, lambda: hf.Phi3Config(**GROUPED, pad_token_id=0)),
    "gpt2": (
        hf.GPT2LMHeadModel,
        lambda: hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=320, n_positions=128),
    ),
}
ENCODERS: dict[str, tuple[Any, Any]] = {
    "bert": (hf.BertForSequenceClassification, lambda: hf.BertConfig(**SMALL)),
    "roberta": (
        hf.RobertaForTokenClassification,
        lambda: hf.RobertaConfig(**{**SMALL, "max_position_embeddings": 130}),
    ),
    "distilbert": (
        hf.DistilBertForQuestionAnswering,
        lambda: hf.DistilBertConfig(
            dim=64, n_layers=2, n_heads=4, hidden_dim=128, vocab_size=320, max_position_embeddings=128
        ),
    ),
    "albert": (hf.AlbertForMaskedLM, lambda: hf.AlbertConfig(**SMALL, embedding_size=32)),
}
IMAGES: dict[str, tuple[Any, Any]] = {
    "vit": (hf.ViTModel, lambda: hf.ViTConfig(**VISION, image_size=32, patch_size=8)),
    "convnext": (
        hf.ConvNextForImageClassification,
        lambda: hf.ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1], image_size=64),
    ),
}
OUTPUTS = {
    "bert": ["logits"], "roberta": ["logits"], "distilbert": ["start_logits", "end_logits"], "albert": ["logits"],
}  # fmt: skip


@pytest.fixture
def convert(save_tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Made]:
    def run(name: str, family: tuple[Any, Any], **options: Any) -> Made:
        model_class, config = family
        return make(save_tiny(model_class, config(), name), tmp_path, "float16", **options)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(convert: Callable[..., Made], name: str) -> None:
    made = convert(name, DECODERS[name])
    assert made.info["trace_error"] < 1e-5
    assert made.info["evaluated"]["relative_error"] < 5e-3
    assert made.info["evaluated"]["kl"] < 1e-5
    assert made.info["unplaced"] == []
    # Several lengths, each with and without padding.
    assert {"17 tokens, 11 valid", "17 tokens, 17 valid"} <= set(made.info["evaluated"]["probes"])
    if name in ("mistral", "gemma3"):
        assert "27 tokens, 27 valid" in made.info["evaluated"]["probes"]  # past the window of 24


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt2"])
def test_stateful_decoders(convert: Callable[..., Made], name: str) -> None:
    made = convert(name, DECODERS[name], stateful=True, seq_length=64)
    assert made.info["trace_error"] < 1e-5
    assert made.info["evaluated"]["relative_error"] < 5e-3
    assert len(made.program.spec.description.state) == 4
    assert made.info["operations"]["write_state"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_and_their_heads(convert: Callable[..., Made], name: str) -> None:
    made = convert(name, ENCODERS[name])
    assert made.info["trace_error"] < 1e-5
    assert made.info["evaluated"]["relative_error"] < 5e-3
    assert list(made.program.outputs) == OUTPUTS[name]


def test_an_encoder_takes_segments(convert: Callable[..., Made], save_tiny: Callable[..., Path]) -> None:
    made = convert("bert", ENCODERS["bert"], token_type_ids=True)
    model = hf.BertForSequenceClassification.from_pretrained(
        save_tiny(*_built(ENCODERS["bert"]), "bert"), dtype=torch.float32
    )
    ids, mask = torch.randint(1, 320, (1, 12)), torch.ones(1, 12, dtype=torch.int32)
    second = (torch.arange(12) > 5).int()[None]
    with torch.no_grad():
        wanted = model(ids, mask, second).logits
        other = model(ids, mask).logits
    found = made.run(input_ids=ids.int(), attention_mask=mask, token_type_ids=second)["logits"]
    assert float((found - wanted).abs().max()) < 0.1 * float((other - wanted).abs().max())


def _built(family: tuple[Any, Any]) -> tuple[Any, Any]:
    return family[0], family[1]()


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_vision_models(convert: Callable[..., Made], name: str) -> None:
    made = convert(name, IMAGES[name])
    assert made.info["trace_error"] < 1e-5
    assert made.info["evaluated"]["relative_error"] < 1e-2
    assert made.program.spec.description.input[0].type.WhichOneof("Type") == "imageType"


def test_a_wrapper_without_the_window_is_caught(
    convert: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrappers, "_attention", lambda config, length: ((), None))
    with pytest.raises(
        ConversionError, match="does not compute what the model does: logits differs by"
    ) as caught:
        convert("mistral", DECODERS["mistral"])
    assert "27 tokens" in str(caught.value)


def test_a_wrapper_that_lets_padding_in_is_caught(
    convert: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrappers, "_BLOCKED", -1.0)
    with pytest.raises(ConversionError, match="does not compute what the model does"):
        convert("bert", ENCODERS["bert"])


def test_positions_that_start_elsewhere_are_caught(
    convert: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrappers, "_first_position", lambda model: 0)
    with pytest.raises(ConversionError, match="does not compute what the model does"):
        convert("roberta", ENCODERS["roberta"])
