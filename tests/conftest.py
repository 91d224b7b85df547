"""Real models for the tests: SmolLM2 from PyPI, and stories15M where a data folder holds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwodel.backends.gguf.toolchain import converter
from qwodel.cache import cache_dir
from qwodel.demo import demo_model

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DATA = Path(os.environ.get("QWODEL_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, made once in the user's cache."""
    return demo_model(cache_dir())


@pytest.fixture(scope="session")
def stories15m() -> Path:
    """A trained 15 M parameter Llama in float32; its rows divide by 32, not by 256."""
    folder = DATA / "stories15M"
    if not folder.is_dir():
        pytest.skip("stories15M is not here; set QWODEL_TEST_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """WikiText-2 validation text."""
    file = DATA / "wikitext-2" / "wiki.valid.tokens"
    if not file.is_file():
        pytest.skip("WikiText-2 is not here; set QWODEL_TEST_DATA to the folder that holds it")
    return file


@pytest.fixture(scope="session")
def smollm2_gguf(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as the bfloat16 GGUF llama.cpp's converter makes of it."""
    return converted(smollm2, tmp_path_factory.mktemp("gguf") / "SmolLM2-135M-Instruct-BF16.gguf")


def converted(source: Path, target: Path) -> Path:
    """A directory as the bfloat16 GGUF llama.cpp's converter makes of it."""
    script = converter().script
    command = [sys.executable, str(script), str(source), "--outfile", str(target), "--outtype", "bf16"]
    subprocess.run(command, check=True, capture_output=True)
    return target


def first_layers(source: Path, folder: Path, count: int) -> Path:
    """Save a model's first layers, with its embeddings and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(source, dtype="auto", num_hidden_layers=count).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder
