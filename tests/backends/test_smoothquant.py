"""The SmoothQuant backend: what it writes, who reads it, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from qwodel import Quantizer
from qwodel.exceptions import CalibrationError, ConfigurationError, IntegrityError, ValidationError
from qwodel.smoothquant import Int8ForCausalLM, compute_activation_scales, save_activation_scales
from tests.smoothquant.conftest import (
    IDS,
    SIZES,
    difference,
    llama,
    load,
    logits,
    one_thread,
    opt,
    text,
    tiny_directory,
)

__all__ = ["llama", "one_thread", "opt", "text"]  # fixtures


@pytest.mark.parametrize("options", [{}, {"optimizer": "gptq"}], ids=["nearest", "gptq"])
@pytest.mark.parametrize("name", ["w8a8_dynamic", "w8a8_static"])
def test_a_directory_that_transformers_and_we_load(
    name: str, options: dict[str, Any], llama: Path, text: Path, tmp_path: Path
) -> None:
    quantizer = Quantizer(
        "smoothquant", str(llama), tmp_path, calibration_dataset=str(text), **SIZES, **options
    )
    folder = quantizer.quantize(name)
    info = quantizer.get_model_info()
    exact = logits(load(llama))
    bound = 0.12 if name == "w8a8_dynamic" else 0.25
    assert difference(load(folder), exact) < bound
    assert difference(Int8ForCausalLM.from_pretrained(folder), exact) < bound
    assert info["logits"]["int8"] <= 3e-2
    assert info["logits"]["int8_layer"] <= 1e-3
    assert info["logits"]["transformers"] <= 3e-2
    assert info["smoothing"]["change"] <= 1e-5
    assert info["smoothing"]["undone"] == []
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert quantization["format"] == "int-quantized"
    group = quantization["config_groups"]["group_0"]
    assert group["weights"]["strategy"] == "channel"
    static = name == "w8a8_static"
    assert group["input_activations"]["strategy"] == ("tensor" if static else "token")
    assert group["input_activations"]["dynamic"] is not static
    stored = load_file(folder / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.int8
    assert ("model.layers.0.mlp.down_proj.input_scale" in stored) is static
    assert stored["lm_head.weight"].dtype == torch.float32
    assert transformers.AutoTokenizer.from_pretrained(folder)("w3 w4")["input_ids"] == [6, 7]


def test_a_layer_that_computes_something_else_is_found(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_int8 = Int8ForCausalLM.from_pretrained

    def wrong(*args: Any, **kwargs: Any) -> Int8ForCausalLM:
        loaded = load_int8(*args, **kwargs)
        loaded.model.model.layers[1].mlp.up_proj.weight_scale.mul_(1.02)
        return loaded

    monkeypatch.setattr(Int8ForCausalLM, "from_pretrained", wrong)
    quantizer = Quantizer(
        "smoothquant", str(llama), tmp_path / "out", alpha=0.5, calibration_dataset=str(text), **SIZES
    )
    with pytest.raises(IntegrityError, match=r"outputs of model\.layers\.1\.mlp\.up_proj differ by 0\.02"):
        quantizer.quantize("w8a8_dynamic")
    assert not list((tmp_path / "out").glob("*"))


def test_smoothing_is_worth_it(llama: Path, text: Path, tmp_path: Path) -> None:
    exact = logits(load(llama))
    errors = {}
    for label, options in {
        "plain": {"alpha": 0.5, "rotations": "none"},
        "searched": {},
        "rotated": {"rotations": "all"},
    }.items():
        quantizer = Quantizer(
            "smoothquant", str(llama), tmp_path / label, calibration_dataset=str(text), **SIZES, **options
        )
        folder = quantizer.quantize("w8a8_static")
        errors[label] = difference(Int8ForCausalLM.from_pretrained(folder), exact)
    naive = Int8ForCausalLM.from_float(load(llama))
    assert min(errors.values()) < 1.5 * difference(naive, exact)
    assert errors["rotated"] < errors["plain"]


def test_rotated_inputs_are_for_qwodel_alone(llama: Path, text: Path, tmp_path: Path) -> None:
    quantizer = Quantizer(
        "smoothquant", str(llama), tmp_path, calibration_dataset=str(text), rotations="all", **SIZES
    )
    folder = quantizer.quantize("w8a8")
    assert folder.name == "llama-w8a8_dynamic-rotated"
    assert quantizer.get_model_info()["read_by"] == "qwodel"
    assert difference(Int8ForCausalLM.from_pretrained(folder), logits(load(llama))) < 0.1
    with pytest.raises(ValueError, match="qwodel-int8"):
        load(folder)


def test_scales_of_a_file_need_no_text(opt: Path, tmp_path: Path) -> None:
    model = load(opt)
    scales = save_activation_scales(compute_activation_scales(model, [IDS]), tmp_path / "scales.safetensors")
    folder = Quantizer("smoothquant", str(opt), tmp_path, act_scales=str(scales), alpha=0.85).quantize(
        "w8a8-dynamic"
    )
    assert difference(Int8ForCausalLM.from_pretrained(folder), logits(model)) < 0.12


@pytest.mark.parametrize("name", ["mixtral", "gpt-neox"])
def test_other_architectures(name: str, text: Path, tmp_path: Path) -> None:
    source = tiny_directory(name, tmp_path / name)
    quantizer = Quantizer(
        "smoothquant", str(source), tmp_path, calibration_dataset=str(text), alpha=0.5, **SIZES
    )
    folder = quantizer.quantize("w8a8_dynamic")
    kept = quantizer.get_model_info()["kept"]
    assert not [key for key in kept if "q_proj" in key or "query_key_value.weight" in key]
    assert difference(Int8ForCausalLM.from_pretrained(folder), logits(load(source))) < 0.3


def test_what_cannot_be_is_refused_before_work_starts(llama: Path, text: Path, tmp_path: Path) -> None:
    def run(fmt: str = "w8a8_dynamic", **options: Any) -> None:
        Quantizer("smoothquant", str(llama), tmp_path / "out", **options).quantize(fmt)

    with pytest.raises(CalibrationError, match="a search of α needs calibration text"):
        run()
    with pytest.raises(CalibrationError, match="static activations needs calibration text"):
        run("w8a8_static", alpha=0.5, act_scales="scales.pt")
    with pytest.raises(CalibrationError, match="GPTQ needs calibration text"):
        run(alpha=0.5, act_scales="scales.pt", optimizer="gptq")
    with pytest.raises(ConfigurationError, match="alpha lies in"):
        run(alpha=1.5, calibration_dataset=str(text))
    with pytest.raises(ConfigurationError, match="belong to calibration_dataset"):
        run(alpha=0.5, act_scales="scales.pt", num_samples=3)
    with pytest.raises(ConfigurationError, match="choice of the search"):
        run(alpha=0.5, act_scales="scales.pt", rotations="folded")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_conv1d_is_refused_with_the_way_out(tmp_path: Path, text: Path) -> None:
    from tests.modeling.test_wiring import tiny
    from tests.smoothquant.conftest import save_tokenizer

    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2")
    with pytest.raises(ValidationError, match="knows no Conv1D") as caught:
        Quantizer(
            "smoothquant", str(tmp_path / "gpt2"), tmp_path / "out", calibration_dataset=str(text), **SIZES
        ).quantize("w8a8")
    assert "from_float" in (caught.value.hint or "")
    assert not list((tmp_path / "out").glob("*"))
