"""Trained models through the facade, read back by the programs the files are for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwodel.quantizer import Quantizer
from tests.checkpoint.checkpoints import sqnr
from tests.checkpoint.test_comfyui import decode_with_comfy_kitchen

TOKENS = 20
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Write a short poem about the sea.",
    "What is photosynthesis?",
    "Give me three tips for sleeping better.",
    "Who wrote Romeo and Juliet?",
    "Explain gravity to a child.",
    "What is the difference between a cat and a dog?",
    "Translate 'good morning' into Spanish.",
)
"""Those of benchmarks/greedy_text.py, chosen before anything was run."""
OTHER_TEXT = "The lighthouse keeper wrote in his log that the storm had passed, and that the boats were back."


def load(folder: Path) -> Any:
    """A model as a user of transformers loads it on a CPU."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@dataclass(frozen=True)
class Written:
    """Greedy text: ``ids`` ``[prompt + N]``, and the logits ``[N, vocabulary]`` each token was taken from."""

    prompt: int
    ids: torch.Tensor
    logits: torch.Tensor

    @property
    def tokens(self) -> torch.Tensor:
        return self.ids[self.prompt :]


@dataclass(frozen=True)
class Source:
    """SmolLM2 in fp32, its answers to the questions, and its logits for another text."""

    answers: tuple[Written, ...]
    other: torch.Tensor
    other_logits: torch.Tensor


def predict(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids[None]).logits[0]
    return logits


def write(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    text: torch.Tensor = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=model.config.eos_token_id,
    )
    return text[0]


@pytest.fixture(scope="module")
def source(smollm2: Path) -> Source:
    transformers = pytest.importorskip("transformers")
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(smollm2), load(smollm2)
    answers = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        start = prompt["input_ids"][0]
        ids = write(model, start)
        answers.append(Written(len(start), ids, predict(model, ids)[len(start) - 1 : -1]))
    other = tokenizer(OTHER_TEXT, return_tensors="pt")["input_ids"][0]
    return Source(tuple(answers), other, predict(model, other))


def margins(logits: torch.Tensor) -> torch.Tensor:
    """Distance of the two highest logits, ``[N]``."""
    top = logits.topk(2).values
    return top[:, 0] - top[:, 1]


def margin_error(before: torch.Tensor, after: torch.Tensor) -> float:
    """Root mean square of how far the difference of the two tokens that led before has moved."""
    first, second = before.topk(2).indices.unbind(1)
    steps = torch.arange(len(before))
    moved = after[steps, first] - after[steps, second] - margins(before)
    return float(moved.square().mean().sqrt())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name", "error", "same", "agreeing"),
    [
        ("fp8", "fp8_e4m3", 0.7, 2, 0.8),
        ("fp8", "fp8_e4m3_row", 0.6, 2, 0.8),
        ("int8", "int8_row", 0.3, 4, 0.9),
    ],
)
def test_smollm2_writes_its_sources_text_up_to_near_ties(
    smollm2: Path,
    source: Source,
    tmp_path: Path,
    backend: str,
    name: str,
    error: float,
    same: int,
    agreeing: float,
) -> None:
    """Both in fp32, weights quantized, activations not.

    Where the texts part, the source itself was undecided: its two best tokens were no further apart
    than a few times what quantizing moves such differences by, measured on another text.
    """
    quantized = load(Quantizer(backend, smollm2, tmp_path, activations="none").quantize(name))
    typical = margin_error(source.other_logits, predict(quantized, source.other))
    assert 0.01 < typical < error
    whole, agreed, total, checked = 0, 0, 0, False
    for answer in source.answers:
        found = predict(quantized, answer.ids)[answer.prompt - 1 : -1].argmax(-1)
        differs = (found != answer.tokens).nonzero()
        if len(differs):
            assert float(margins(answer.logits)[int(differs[0])]) < 3 * typical
        elif not checked:
            assert torch.equal(write(quantized, answer.ids[: answer.prompt]), answer.ids)
            checked = True
        whole += not len(differs)
        agreed += int((found == answer.tokens).sum())
        total += len(found)
    assert whole >= same
    assert agreed / total >= agreeing


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "name"), [("fp8", "fp8_e4m3"), ("int8", "int8_row")])
def test_comfy_kitchen_decodes_every_tensor_of_smollm2_to_what_is_reported(
    smollm2: Path, tmp_path: Path, backend: str, name: str
) -> None:
    kitchen = pytest.importorskip("comfy_kitchen")
    quantizer = Quantizer(backend, smollm2, tmp_path, layout="comfyui")
    out = load_file(quantizer.quantize(name))
    source = load_file(smollm2 / "model.safetensors")
    reported = json.loads(Path(quantizer.get_model_info()["manifest"]).read_text())["sqnr_db"]
    assert len(reported) == 210
    with kitchen.use_backend("eager"):
        for key, weight in source.items():
            if key in reported:
                decoded = decode_with_comfy_kitchen(out, key.removesuffix(".weight"))
                assert sqnr(weight.float(), decoded) == pytest.approx(reported[key], abs=0.02), key
            else:
                assert torch.equal(out[key], weight), key
