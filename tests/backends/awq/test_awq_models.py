"""Tiny models of many kinds through the whole backend: wiring, experts, formats, failures, retries."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwodel import Quantizer
from qwodel.backends.awq import launch
from qwodel.backends.awq.compress import Compression
from qwodel.exceptions import (
    CalibrationError,
    Cancelled,
    ConfigurationError,
    ConversionError,
    IntegrityError,
    QuantizationError,
    ResourceError,
    ValidationError,
)
from tests.backends.awq.models import VOCABULARY, tiny_model, write_jsonl
from tests.backends.awq.packed import decode

QUICK: dict[str, Any] = {"num_samples": 8, "seq_length": 32, "batch_size": 4, "n_grid": 4}
PROBE = torch.arange(4, 36).reshape(1, 32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWODEL_CACHE", str(tmp_path_factory.mktemp("cache")))


def _quantize(model: Path, out: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    text = write_jsonl(out.with_name("text.jsonl"))
    settings = {"calibration_dataset": str(text), **QUICK, **options}
    quantizer = Quantizer("awq", model, out, **settings)
    return quantizer.quantize("int4"), quantizer.get_model_info()


def _logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=PROBE).logits
    return logits.double()


def _distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / first.norm())


@pytest.mark.parametrize("kind", ["Llama", "Gemma", "StableLm", "OPT"])
def test_known_and_inferred_architectures_give_the_same_model_in_four_bits(kind: str, tmp_path: Path) -> None:
    source = tiny_model(kind, tmp_path)
    path, info = _quantize(source, tmp_path / "out")
    assert info["group_size"] == 32
    assert info["untouched"] == []
    assert info["dropped"] == []
    before, after = _logits(source), _logits(path)
    # Four bits cost something, and a wrong fold would cost everything.
    assert 1e-4 < _distance(before, after) < 0.35
    assert (path / "LICENSE").read_text() == "a licence\n"


def test_scales_that_move_keep_weight_and_norm_together(tmp_path: Path) -> None:
    """What the result's norm and weight do together is what the source's did, up to four-bit rounding."""
    from safetensors.torch import load_file

    source = tiny_model("Gemma", tmp_path)
    path, _ = _quantize(source, tmp_path / "out")
    old, new = load_file(source / "model.safetensors"), load_file(path / "model.safetensors")
    layer = "model.layers.0.self_attn.q_proj"
    norm = "model.layers.0.input_layernorm.weight"
    scaled = decode(path, layer) * (1 + new[norm].float())
    exact = old[f"{layer}.weight"].float() * (1 + old[norm].float())
    assert _distance(exact, scaled) < 0.2


def test_experts_are_quantized_each_and_routers_are_not(tmp_path: Path) -> None:
    source = tiny_model("Qwen3Moe", tmp_path)
    path, info = _quantize(source, tmp_path / "out")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert info["untouched"] == []
    assert info["layers"] == 2 * (4 + 4 * 3)
    assert len(info["expert_tokens"]) == 2 * 4 * 3
    assert len(set(info["expert_tokens"].values())) == 1  # all experts see all tokens
    assert any(name.endswith("mlp.gate") or "lm_head" in name for name in config["ignore"])
    from qwodel.backends.awq.verify import tensor_entries

    stored = tensor_entries(path)
    assert "model.layers.0.mlp.gate.weight" in stored
    assert "model.layers.1.mlp.experts.3.down_proj.weight_packed" in stored


def test_experts_without_tokens_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny_model("Qwen3Moe", tmp_path, num_experts=16)
    with caplog.at_level(logging.WARNING, "AWQQuantizer"):
        _, info = _quantize(
            source,
            tmp_path / "out",
            moe_calibrate_all_experts=False,
            num_samples=2,
            seq_length=8,
            batch_size=1,
        )
    assert info["untouched"]
    assert all(".experts." in name for name in info["untouched"])
    assert "saw no calibration data" in caplog.text


def test_symmetric_rows_and_ignored_layers(tmp_path: Path) -> None:
    source = tiny_model("Llama", tmp_path)
    path, info = _quantize(
        source,
        tmp_path / "out",
        symmetric=True,
        group_size=-1,
        ignore=["re:.*down_proj", "model.layers.0.self_attn.o_proj"],
    )
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["symmetric"], weights["strategy"], weights["num_bits"]) == (True, "channel", 4)
    assert info["layers"] == 14 - 3
    assert "model.layers.1.mlp.down_proj" in config["ignore"]


def test_half_a_fused_layer_is_refused(tmp_path: Path) -> None:
    source = tiny_model("Llama", tmp_path)
    with pytest.raises(
        IntegrityError, match=r"vLLM loads .*q_proj.* as one layer; .*k_proj is not quantized"
    ):
        _quantize(source, tmp_path / "out", ignore=["re:.*k_proj"])
    assert list((tmp_path / "out").glob("*")) == [] if (tmp_path / "out").exists() else True


def test_token_lists_need_no_tokenizer(tmp_path: Path) -> None:
    source = tiny_model("Llama", tmp_path, tokenizer=False)
    lists = [[4 + (n * step) % 90 for n in range(64)] for step in range(1, 9)]
    path, info = _quantize(source, tmp_path / "out", calibration_dataset=iter(lists))
    assert info["calibration"]["dataset"] == "texts given in Python"
    manifest = json.loads((path / "qwodel.manifest.json").read_text())
    assert manifest["recipe"]["calibration_dataset"] == "8 items given in Python"
    assert _distance(_logits(source), _logits(path)) < 0.35
    with pytest.raises(CalibrationError, match="has no tokenizer"):
        _quantize(source, tmp_path / "out2")
    with pytest.raises(
        CalibrationError, match=f"holds token {VOCABULARY + 9}, and the model knows {VOCABULARY}"
    ):
        _quantize(source, tmp_path / "out3", calibration_dataset=[[VOCABULARY + 9] * 300])


def test_the_calibration_is_cut_to_the_models_context(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny_model("Llama", tmp_path)
    with caplog.at_level(logging.WARNING):
        _, info = _quantize(source, tmp_path / "out", seq_length=500, num_samples=4)
    assert info["calibration"]["seq_length"] == 64
    assert "cut to the model's context of 64" in caplog.text


def test_real_errors_come_before_work_with_cause_and_hint(tmp_path: Path) -> None:
    source = tiny_model("Llama", tmp_path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    cases: list[tuple[type[QuantizationError], str, dict[str, Any]]] = [
        (CalibrationError, "holds no text", {"calibration_dataset": str(empty)}),
        (CalibrationError, "no text column 'story'", {"text_column": "story"}),
        (CalibrationError, "is too small: it holds", {"num_samples": 5000}),
        (CalibrationError, "does not exist", {"calibration_dataset": str(tmp_path / "none.txt")}),
        (ConfigurationError, "group_size 40 does not divide the columns", {"group_size": 40}),
        (ConfigurationError, "is not a regular expression", {"ignore": ["re:("]}),
        (ConfigurationError, "no option 'n_gird'", {"n_gird": 3}),
        (ConfigurationError, "cannot share 1 samples", {"nproc": 2, "num_samples": 1}),
    ]
    for kind, message, options in cases:
        with pytest.raises(kind, match=message):
            _quantize(source, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_architectures_that_cannot_be_quantized_say_so(tmp_path: Path) -> None:
    source = tiny_model("GPT2", tmp_path)
    with pytest.raises(ValueError, match="unsupported model architecture GPT2LMHeadModel: .*Conv1D"):
        _quantize(source, tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    with pytest.raises(ValidationError, match="unsupported model architecture BertModel"):
        _quantize(source, tmp_path / "out")
    quantized = {**config, "quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(ValidationError, match=r"quantized already \(fp8\)"):
        _quantize(source, tmp_path / "out")


def test_out_of_memory_is_retried_smaller_from_clean_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model("Llama", tmp_path)
    real, seen = launch.compress, []

    def small_device(work: Compression, *rest: Any, **named: Any) -> Any:
        import numpy as np

        seen.append((work.batch_size, np.load(work.tokens).shape))
        if work.batch_size > 1:
            # Half-way, as a real one: files are there already.
            work.target.mkdir()
            (work.target / "model.safetensors").write_bytes(b"half")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return real(work, *rest, **named)

    monkeypatch.setattr(launch, "compress", small_device)
    path, _ = _quantize(source, tmp_path / "out")
    assert [batch for batch, _ in seen] == [4, 2, 1]
    manifest = json.loads((path / "qwodel.manifest.json").read_text())
    assert [step["next"][:13] for step in manifest["calibration"]["backoff"]] == [
        "batch_size 2,",
        "batch_size 1,",
    ]
    assert manifest["calibration"]["batch_size"] == 1
    monkeypatch.setattr(launch, "compress", real)
    direct, _ = _quantize(source, tmp_path / "direct", batch_size=1)
    assert torch.equal(_logits(path), _logits(direct))

    def no_device(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(launch, "compress", no_device)
    with pytest.raises(ResourceError, match="smallest sizes tried") as caught:
        _quantize(source, tmp_path / "none")
    assert "would have fitted" in str(caught.value.hint)
    assert not any((tmp_path / "none").glob("*")) if (tmp_path / "none").exists() else True


def test_cancelling_leaves_nothing(tmp_path: Path) -> None:
    source = tiny_model("Llama", tmp_path)
    text = write_jsonl(tmp_path / "text.jsonl")

    def stop(percent: int, stage: str, message: str) -> None:
        if "searching" in message:
            raise RuntimeError("enough")

    quantizer = Quantizer("awq", source, tmp_path / "out", stop, calibration_dataset=str(text), **QUICK)
    with pytest.raises(Cancelled, match="enough"):
        quantizer.quantize("int4")
    assert not (tmp_path / "out").exists()


def test_an_error_of_a_process_is_the_runs_error(tmp_path: Path) -> None:
    for error, kind in [
        (ConfigurationError("x divides nothing", hint="take 32"), ConfigurationError),
        (torch.OutOfMemoryError("CUDA out of memory"), MemoryError),
        (KeyError("odd"), ConversionError),
    ]:
        launch._write_error(error, tmp_path, 1)
        found = launch._read_error(tmp_path / "error-1.json")
        assert type(found) is kind
        assert str(found) == str(error)
        assert getattr(found, "hint", None) == getattr(error, "hint", None)


@pytest.mark.slow
def test_two_processes_calibrate_as_one(tmp_path: Path) -> None:
    """Two gloo ranks on the CPU: the scales come from all samples, and the result is whole."""
    source = tiny_model("Llama", tmp_path)
    seen: list[int] = []
    text = write_jsonl(tmp_path / "text.jsonl")
    options = {**QUICK, "calibration_dataset": str(text)}
    both = Quantizer("awq", source, tmp_path / "two", lambda percent, *_: seen.append(percent), **options)
    two = both.quantize("int4", nproc=2)
    one = Quantizer("awq", source, tmp_path / "one", **options).quantize("int4")
    assert _distance(_logits(one), _logits(two)) < 1e-3
    assert seen == sorted(seen)
    assert any(10 < percent < 90 for percent in seen)
