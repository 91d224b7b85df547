"""Trained models through the facade, read back by the programs the files are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwodel.quantizer import Quantizer
from tests.checkpoint.checkpoints import sqnr
from tests.checkpoint.test_comfyui import decode_with_comfy_kitchen

TOKENS = 20
PROMPTS = (
    "Explain in one sentence what the Moon is.",
    "Once upon a time, there was a little girl who",
    "Water boils at",
)


def load(folder: Path) -> Any:
    """A model as a user of transformers loads it on a CPU."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name"), [("fp8", "fp8_e4m3"), ("fp8", "fp8_e4m3_row"), ("int8", "int8_row")]
)
def test_smollm2_mostly_predicts_the_tokens_its_source_writes(
    smollm2: Path, tmp_path: Path, backend: str, name: str
) -> None:
    """Fed the source's own greedy text: free-running text may part after one close call."""
    transformers = pytest.importorskip("transformers")
    tokenizer, source = transformers.AutoTokenizer.from_pretrained(smollm2), load(smollm2)
    quantized = load(Quantizer(backend, smollm2, tmp_path).quantize(name))
    agreed = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        text = source.generate(**ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        with torch.no_grad():
            predicted = quantized(text).logits[0, -TOKENS - 1 : -1].argmax(-1)
        agreed += int((predicted == text[0, -TOKENS:]).sum())
    assert agreed / (TOKENS * len(PROMPTS)) >= 0.8


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
