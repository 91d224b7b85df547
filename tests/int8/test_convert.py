from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwodel.exceptions import ValidationError
from qwodel.int8 import convert_to_int8
from tests.checkpoint.checkpoints import llama_weights, sqnr

LAYER = "model.layers.0.mlp.down_proj"


def run(
    tmp_path: Path, weights: dict[str, torch.Tensor] | None = None, **options: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    save_file(weights or llama_weights(1), tmp_path / "in.safetensors")
    required: dict[str, Any] = {"comfy_quant": True, "filter_flags": {}, "calib_samples": 6144, "seed": 42}
    result = convert_to_int8(
        str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), **{**required, **options}
    )
    return result, load_file(tmp_path / "out.safetensors")


def test_documented_call(tmp_path: Path) -> None:
    result, out = run(tmp_path, num_iter=20)
    assert out[f"{LAYER}.weight"].dtype == torch.int8
    assert out[f"{LAYER}.weight_scale"].shape == (48, 1)
    decoded = out[f"{LAYER}.weight"].float() * out[f"{LAYER}.weight_scale"]
    quality = {layer.name: layer for layer in result.quality}
    assert sqnr(llama_weights(1)[f"{LAYER}.weight"].float(), decoded) == pytest.approx(
        quality[f"{LAYER}.weight"].sqnr_db, abs=0.02
    )
    assert quality[f"{LAYER}.weight"].rounding == "learned"


def test_the_manifest_has_the_envelope(tmp_path: Path) -> None:
    zero = llama_weights(1) | {f"{LAYER}.weight": torch.zeros(48, 96)}
    run(tmp_path, zero, no_learned_rounding=True)
    text = (tmp_path / "out.manifest.json").read_text("utf-8")
    manifest = json.loads(text, parse_constant=pytest.fail)  # a layer of zeros has an infinite SQNR
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("*.safetensors")
    }
    assert (manifest["schema"], manifest["backend"]) == (1, "int8")
    assert manifest["source"]["sha256"] == {"in.safetensors": digests["in.safetensors"]}
    assert manifest["outputs"]["out.safetensors"]["sha256"] == digests["out.safetensors"]
    assert manifest["recipe"]["seed"] == 42
    assert "torch" in manifest["versions"]


def test_a_link_out_of_the_folder_is_in_no_output(tmp_path: Path) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("PRIVATE KEY")
    save_file(llama_weights(1), folder / "model.safetensors")
    (folder / "config.json").symlink_to(secret)
    with pytest.raises(ValidationError, match=r"config\.json is a link that leads out"):
        convert_to_int8(
            str(folder), str(tmp_path / "out.safetensors"), True, {}, 1, 0, no_learned_rounding=True
        )
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "dtypes"),
    [
        ({"fp16": True}, {f"{LAYER}.weight": torch.float16, "lm_head.weight": torch.float16}),
        ({"custom_layers": "down_proj", "custom_type": "fp16"}, {f"{LAYER}.weight": torch.float16}),
        ({"exclude_layers": "down_proj"}, {f"{LAYER}.weight": torch.bfloat16}),
        (
            {"skip_inefficient_layers": True, "custom_layers": "q_proj", "no_learned_rounding": True},
            {f"{LAYER}.weight": torch.bfloat16},
        ),
        (
            {"skip_inefficient_layers": True, "fallback": "int8", "fallback_block_size": 16},
            {f"{LAYER}.weight": torch.int8},
        ),
        (
            {"layer_config": {"layer_patterns": {"down_proj": {"format": "fp16"}}}},
            {f"{LAYER}.weight": torch.float16},
        ),
        (
            {"scaling_mode": "tensor", "low_memory": True, "streaming_mode": "off"},
            {f"{LAYER}.weight": torch.int8},
        ),
    ],
)
def test_options_decide_what_layers_become(
    tmp_path: Path, options: dict[str, Any], dtypes: dict[str, torch.dtype]
) -> None:
    _, out = run(
        tmp_path,
        **({} if options.get("fp16") or options.get("no_learned_rounding") else {"num_iter": 2}) | options,
    )
    assert {name: out[name].dtype for name in dtypes} == dtypes


def test_older_names(tmp_path: Path) -> None:
    result, out = run(tmp_path, comfy_quant=False, no_learned_rounding=True)
    assert f"{LAYER}.scale_weight" in out
    assert result.warnings


def test_low_quality_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        result, _ = run(tmp_path, no_learned_rounding=True, quality_threshold=90.0, report_quality=True)
    assert len(result.below_threshold) == 4
    assert "below 90.0 dB" in caplog.text
    assert f"dB  {LAYER}.weight" in caplog.text


def test_lora_is_merged_first(tmp_path: Path) -> None:
    down, up = torch.randn(2, 96), torch.randn(48, 2)
    save_file({f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    _, out = run(
        tmp_path,
        no_learned_rounding=True,
        merge_lora_path=str(tmp_path / "lora.safetensors"),
        merge_lora_scale=0.5,
    )
    expected = llama_weights(1)[f"{LAYER}.weight"].float() + 0.5 * up @ down
    assert sqnr(expected, out[f"{LAYER}.weight"].float() * out[f"{LAYER}.weight_scale"]) > 38


def test_a_failure_leaves_the_old_output(tmp_path: Path) -> None:
    _, before = run(tmp_path, no_learned_rounding=True)
    weights = llama_weights(1)
    weights[f"{LAYER}.weight"][0, 0] = torch.inf
    with pytest.raises(ValidationError, match="down_proj"):
        run(tmp_path, weights, no_learned_rounding=True)
    after = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    save_file(llama_weights(1), tmp_path / "in.safetensors")
    path = str(tmp_path / "in.safetensors")
    with pytest.raises(ValidationError, match="input itself"):
        convert_to_int8(path, path, True, {}, 0, 0)
