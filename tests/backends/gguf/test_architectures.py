"""Small random models of other shapes: biases, Conv1D, untied heads, experts, odd rows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qwodel import Quantizer
from qwodel.backends.gguf.imatrix import read_imatrix
from qwodel.gguf_header import read_gguf_header
from tests.backends.gguf.conftest import load

COMMON: dict[str, Any] = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama with biases and its own head": (
        "Llama",
        {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False, "attention_bias": True},
    ),
    "gpt2 with Conv1D": (
        "GPT2",
        {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_ctx": 128},
    ),
    "llama of odd rows": (
        "Llama",
        {**SIZES, "hidden_size": 72, "intermediate_size": 100, "num_key_value_heads": 4, "head_dim": 18},
    ),
    "mixtral": (
        "Mixtral",
        {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}


def _make(kind: str, target: Path, tokenizer: Path) -> Path:
    name, sizes = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**COMMON, **sizes)
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    getattr(transformers, name + suffix)(config).save_pretrained(target)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, target)
    return target


@pytest.mark.parametrize("kind", MODELS)
def test_other_shapes_convert_and_load(smollm2: Path, tmp_path: Path, kind: str) -> None:
    model = _make(kind, tmp_path / "model", smollm2)
    quantizer = Quantizer("gguf", model, tmp_path / "out")
    path = quantizer.quantize("Q4_K_M")
    info = quantizer.get_model_info()
    assert info["dropped"] == []
    assert info["loaded"]["parameters"] == read_gguf_header(path).parameters
    assert info["tokenizer"]["tokenization"] == "identical"
    if kind == "llama with biases and its own head":
        assert {"output.weight", "blk.0.attn_q.bias"} <= read_gguf_header(path).tensors.keys()
    if kind == "llama of odd rows":
        # 72 columns divide by nothing llama.cpp packs; such tensors stay in half precision.
        assert info["tensor_types"]["F16"] > 0
        assert {item["got"] for item in info["fallbacks"]} == {"F16"}
    llama = load(path, n_ctx=64, logits_all=True)
    llama.eval(llama.tokenize(b"Hello there, world"))
    assert np.isfinite(llama.scores[:3]).all()


def test_experts_are_counted_one_by_one(smollm2: Path, tmp_path: Path) -> None:
    """The matrix of stacked experts against the routing of the model in torch."""
    model = _make("mixtral", tmp_path / "model", smollm2)
    text = "Some words that experts may share. " * 12
    quantizer = Quantizer(
        "gguf", model, tmp_path / "out", calibration_dataset=[text], seq_length=32, num_samples=1
    )
    quantizer.quantize("Q4_0")
    report = quantizer.get_model_info()["importance_matrix"]
    matrix = read_imatrix(tmp_path / "out" / report["file"])

    tokens = transformers.AutoTokenizer.from_pretrained(model)(text + "\n", add_special_tokens=False)[
        "input_ids"
    ]
    network = transformers.MixtralForCausalLM.from_pretrained(model).eval()
    seen: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(network.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, args, index=index: seen.__setitem__(index, args[0][0]))
    with torch.no_grad():
        network(torch.tensor([tokens[:32]]))
    for index, layer in enumerate(network.model.layers):
        x = seen[index].double()
        chosen = torch.topk(x.float() @ layer.mlp.gate.weight.T, 2).indices
        entry = matrix.entries[f"blk.{index}.ffn_up_exps.weight"]
        expected_counts = [int((chosen == expert).sum()) for expert in range(4)]
        assert entry.counts.tolist() == expected_counts
        for expert in range(4):
            rows = x[(chosen == expert).any(dim=1)]
            np.testing.assert_allclose(entry.sums[expert], rows.square().sum(0).numpy(), rtol=0.05, atol=1e-3)
