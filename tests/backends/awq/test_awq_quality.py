"""Real weights: what the files hold, decoded independently, and how far the model is from its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwodel import Quantizer
from qwodel.calibration import load_tokens
from tests.backends.awq.packed import decode, round_to_nearest
from tests.conftest import first_layers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(
    stories15m: Path, wikitext: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], list[tuple[int, str, str]]]:
    """One run on WikiText for all the tests of this module."""
    events: list[tuple[int, str, str]] = []
    quantizer = Quantizer(
        "awq", stories15m, tmp_path_factory.mktemp("awq"), lambda *event: events.append(event),
        calibration_dataset=str(wikitext), num_samples=16, seq_length=128, batch_size=8, n_grid=8,
    )  # fmt: skip
    path = quantizer.quantize("int4")
    return path, quantizer.get_model_info(), events


def _load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _divergence(source: Any, other: Any, tokens: torch.Tensor) -> float:
    """Mean KL divergence per token, in nats."""
    with torch.no_grad():
        p = source(input_ids=tokens).logits.double().log_softmax(-1)
        q = other(input_ids=tokens).logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_result_is_nearer_to_its_source_than_round_to_nearest(
    run: tuple[Path, dict[str, Any], Any], stories15m: Path
) -> None:
    """At least 35 % below the plain W4A16 of the same groups, and below asymmetric rounding too."""
    source, result = _load(stories15m), _load(run[0])
    torch.manual_seed(1)
    held_out = source.generate(
        torch.full((6, 1), 1), attention_mask=torch.ones(6, 1), do_sample=True, top_k=0,
        min_length=64, max_length=64, pad_token_id=2,
    )  # fmt: skip
    ours = _divergence(source, result, held_out)
    plain = {}
    for symmetric in (True, False):
        model = _load(stories15m)
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and name != "lm_head":
                    module.weight.copy_(round_to_nearest(module.weight, 32, symmetric=symmetric))
        plain[symmetric] = _divergence(source, model, held_out)
    assert 0 < ours < 0.65 * plain[True], (ours, plain)
    assert ours < 0.95 * plain[False], (ours, plain)


def test_transformers_computes_with_the_weights_the_file_holds(
    run: tuple[Path, dict[str, Any], Any], stories15m: Path
) -> None:
    from safetensors import safe_open

    path, info, _ = run
    model = _load(path)
    decoded = _load(stories15m)
    packed = plain = 0
    with torch.no_grad(), safe_open(path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        for name, module in decoded.named_modules():
            if f"{name}.weight_packed" in names:
                module.weight.copy_(decode(path, name))
                packed += sum(
                    file.get_tensor(each).nbytes for each in names if each.startswith(f"{name}.weight_")
                )
                plain += module.weight.numel() * 2
            elif f"{name}.weight" in names:
                module.weight.copy_(file.get_tensor(f"{name}.weight"))
    tokens = torch.arange(100, 164).reshape(1, 64)
    with torch.no_grad():
        first, second = (each(input_ids=tokens).logits for each in (model, decoded))
    assert float((first - second).norm() / second.norm()) < 1e-5
    # Four bits, a float32 scale and a zero point for every 32 weights, against sixteen bits.
    assert 0.25 < packed / plain < 0.33
    assert info["quantized_bits_per_weight"] == pytest.approx(16 * packed / plain, abs=1e-3)


def test_the_directory_is_complete_and_described(
    run: tuple[Path, dict[str, Any], Any], stories15m: Path
) -> None:
    path, info, _ = run
    assert path.name == "stories15M-AWQ-int4"
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (path / name).read_bytes() == (stories15m / name).read_bytes()
    config = json.loads((path / "config.json").read_text())
    original = json.loads((stories15m / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert {key: config[key] for key in original} == original
    assert (quantization["quant_method"], quantization["format"]) == ("compressed-tensors", "pack-quantized")
    assert quantization["ignore"] == ["lm_head"]
    assert info["tensors"] == {"quantized": 42, "kept": 14, "dropped": 0}
    assert info["fused_groups"] == 12
    assert (info["group_size"], info["symmetric"], info["untouched"]) == (32, False, [])
    model = _load(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    manifest = json.loads((path / "qwodel.manifest.json").read_text())
    assert manifest["calibration"]["num_samples"] == 16
    assert manifest["calibration"]["backoff"] == []
    assert manifest["versions"]["llmcompressor"]


def test_the_quantized_model_still_tells_stories(run: tuple[Path, dict[str, Any], Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run[0])
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    out = _load(run[0]).generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=2)
    words = tokenizer.decode(out[0], skip_special_tokens=True).split()
    assert len(words) > 15
    assert len(set(words)) > 10


def test_progress_rises_with_the_blocks(run: tuple[Path, dict[str, Any], list[tuple[int, str, str]]]) -> None:
    events = run[2]
    percents = [percent for percent, _, _ in events]
    assert percents == sorted(percents)
    assert percents.count(100) == 1
    assert len(set(percents)) > 50
    blocks = [message for _, stage, message in events if stage == "calibrate" and "block 4 of" in message]
    assert any("searching scales" in message for message in blocks)


def test_smollm2_cut_to_six_layers(smollm2: Path, tmp_path: Path) -> None:
    """576 columns and bfloat16 weights, calibrated on records of a .jsonl file."""
    source = first_layers(smollm2, tmp_path / "SmolLM2-6", 6)
    tokenizer = AutoTokenizer.from_pretrained(source)
    sentences = ["The lighthouse keeper wrote down the weather every evening before the lamp was lit. "] * 40
    text = tmp_path / "chat.jsonl"
    records = [
        {"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": line}]}
        for n, line in enumerate(sentences)
    ]
    text.write_text("\n".join(map(json.dumps, records)))
    quantizer = Quantizer("awq", source, tmp_path, calibration_dataset=str(text), n_grid=4, batch_size=4)
    path = quantizer.quantize("int4", num_samples=4, seq_len=64)
    info = quantizer.get_model_info()
    assert info["group_size"] == 64
    assert info["calibration"]["seq_length"] == 64
    assert 4.0 < info["quantized_bits_per_weight"] < 4.5
    again = AutoModelForCausalLM.from_pretrained(path)
    tokens = torch.from_numpy(load_tokens(text, tokenizer, num_samples=1, seq_length=32))
    out = again.generate(tokens, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 36)
    first, second = (
        decode(path, "model.layers.3.mlp.down_proj"),
        _load(source).model.layers[3].mlp.down_proj.weight.detach(),
    )
    # Scales have moved between up and down, so columns differ by factors; directions do not.
    cosine = torch.nn.functional.cosine_similarity(first.T, second.T)
    assert float(cosine.mean()) > 0.98
