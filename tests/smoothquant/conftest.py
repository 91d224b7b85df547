"""Tiny models with a tokenizer of their own, and text to calibrate on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.modeling.tiny_models import make

SIZES = {"seq_length": 32, "num_samples": 32, "batch_size": 8}
"""A calibration that the tiny models get through at once."""

IDS = torch.tensor([[5, 9, 13, 21, 33, 4, 41, 50]])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


WORDS = [f"w{number}" for number in range(93)]


def with_outliers(model: Any) -> Any:
    """Make two channels of every norm large, as trained models have them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight") and len(parameter) > 17:
                parameter[[3, 17]] += 30
    return model


def save_tokenizer(folder: Path) -> None:
    tokens = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: index + 3 for index, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(tokens, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred lines of random words."""
    generator = random.Random(0)
    lines = [" ".join(generator.choices(WORDS, k=40)) for _ in range(200)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(lines))
    return file


def tiny_directory(name: str, folder: Path) -> Path:
    model = with_outliers(make(name))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory("opt", tmp_path_factory.mktemp("models") / "opt")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found.double()


def difference(model: Any, expected: torch.Tensor) -> float:
    return float((logits(model) - expected).norm() / expected.norm())


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
