"""Greedy text of a quantized chat model against its source's: where they part, and how close the call was.

Both models run in fp32 with the model's own chat template; the questions were fixed before the first
run. ``weights`` decodes the codes and computes in fp32, ``dynamic`` also rounds activations token by
token, as fast kernels do. One table::

    python benchmarks/greedy_text.py                     # SmolLM2-135M-Instruct
    python benchmarks/greedy_text.py --model DIR --formats int8_row fp8_e4m3 --tokens 20
    python benchmarks/greedy_text.py --formats int8_row fp8_e4m3 --calibration text.txt
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
FORMATS = ("fp8_e4m3", "fp8_e4m3_row", "fp8_e4m3_block", "int8_tensor", "int8_row", "int8_block")


@dataclass(frozen=True)
class Answer:
    """What the source writes.

    Attributes:
        prompt: tokens of the prompt.
        ids: ``[1, prompt + N]`` prompt and greedy text.
        logits: ``[N, vocabulary]`` for each token of the text.
        margins: ``[N]`` distance between the two highest logits.
    """

    prompt: int
    ids: torch.Tensor
    logits: torch.Tensor
    margins: torch.Tensor


@dataclass(frozen=True)
class Comparison:
    """One format on one question.

    Attributes:
        matched: tokens until the texts part; all of them when they do not.
        margin: the source's margin there; ``None`` when they do not part.
        error: root mean square over the text of how far quantizing moves the logit
            difference of the source's first and second token.
        agreed: tokens that the quantized model puts first when fed the source's text.
    """

    matched: int
    margin: float | None
    error: float
    agreed: int


def load(folder: Path) -> Any:
    """The model in fp32, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def answer(model: Any, tokenizer: Any, question: str, tokens: int) -> Answer:
    """Let the source answer, greedily, with ``tokens`` tokens or until it ends by itself."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    length = prompt["input_ids"].shape[1]
    with torch.no_grad():
        ids = _write(model, prompt["input_ids"], tokens)
        logits = model(ids).logits[0, length - 1 : -1]
    top = logits.topk(2).values
    return Answer(length, ids, logits, top[:, 0] - top[:, 1])


def _write(model: Any, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    ids: torch.Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=model.config.eos_token_id,
    )
    return ids


def compare(model: Any, answered: Answer) -> Comparison:
    """Let a quantized model answer the same question."""
    start, wanted = answered.prompt, answered.ids[0, answered.prompt :]
    with torch.no_grad():
        found = _write(model, answered.ids[:, :start], len(wanted))[0, start:]
        logits = model(answered.ids).logits[0, start - 1 : -1]
    found = torch.nn.functional.pad(found, (0, len(wanted) - len(found)), value=-1)
    differs = (found != wanted).nonzero()
    matched = int(differs[0]) if len(differs) else len(wanted)
    margin = float(answered.margins[matched]) if len(differs) else None
    first, second = answered.logits.topk(2).indices.unbind(1)
    steps = torch.arange(len(wanted))
    moved = (logits[steps, first] - logits[steps, second]) - answered.margins
    agreed = int((logits.argmax(-1) == wanted).sum())
    return Comparison(matched, margin, float(moved.square().mean().sqrt()), agreed)


def convert(model: Path, name: str, activations: str, calibration: str | None, folder: Path) -> Path:
    from qwodel import Quantizer

    options = {} if calibration is None else {"calibration_dataset": calibration}
    return Quantizer(name.partition("_")[0], model, folder, activations=activations, **options).quantize(name)


def row(name: str, activations: str, comparisons: list[Comparison], answers: list[Answer]) -> str:
    parted = [each for each in comparisons if each.margin is not None]
    error = statistics.fmean(each.error**2 for each in comparisons) ** 0.5
    margins = " ".join(f"{each.matched}:{each.margin:.2f}" for each in parted)
    agreed = sum(each.agreed for each in comparisons) / sum(len(each.margins) for each in answers)
    mean = statistics.fmean(each.matched for each in comparisons)
    return (
        f"{name:<15} {activations:<11} {len(comparisons) - len(parted):>5} of {len(comparisons):<3} {mean:>6.1f} "
        f"{agreed:>7.1%} {error:>7.3f}   {margins}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, help="a chat model's directory; SmolLM2-135M-Instruct by default"
    )
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--activations", nargs="+", default=["none", "dynamic"])
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument(
        "--calibration", help="text to choose codes by (GPTQ); without it codes are the nearest"
    )
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    from qwodel.backends.gguf.toolchain import cache_dir
    from qwodel.demo import demo_model

    folder = arguments.model or demo_model(cache_dir())
    tokenizer, source = AutoTokenizer.from_pretrained(folder), load(folder)
    answers = [answer(source, tokenizer, question, arguments.tokens) for question in QUESTIONS]
    least = " ".join(f"{float(each.margins.min()):.2f}" for each in answers)
    written = sum(len(each.margins) for each in answers)
    print(f"{folder.name}, {len(answers)} questions, {written} tokens; least margins: {least}")
    print(
        f"{'format':<15} {'activations':<11} {'same text':>10} {'tokens':>8} {'top-1':>7} {'error':>7}   parted at token:margin"
    )
    for name in arguments.formats:
        for activations in arguments.activations:
            with tempfile.TemporaryDirectory() as scratch:
                model = load(convert(folder, name, activations, arguments.calibration, Path(scratch)))
                comparisons = [compare(model, each) for each in answers]
            print(row(name, activations, comparisons, answers), flush=True)


if __name__ == "__main__":
    main()
