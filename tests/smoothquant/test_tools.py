"""The three command-line tools end to end on a random OPT, and evaluate_ppl by hand."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from qwodel.cli.main import app
from qwodel.exceptions import CalibrationError, ConfigurationError
from qwodel.smoothquant import (
    Int8OPTForCausalLM,
    Scheme,
    compute_activation_scales,
    evaluate_ppl,
    load_activation_scales,
)
from qwodel.smoothquant.commands import application


def _tool(name: str, *arguments: object) -> str:
    done = CliRunner().invoke(application(name), [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("module", ["generate_act_scales", "export_int8_model", "ppl_eval"])
def test_each_tool_is_a_module_with_the_specs_arguments(module: str) -> None:
    command = [sys.executable, "-m", f"qwodel.smoothquant.{module}", "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"}
    )
    arguments = {
        "generate_act_scales": "--model-name --output-path --num-samples --seq-len --dataset-path --per-gpu-batch-size",
        "export_int8_model": "--model_path --output_path --act_scales_path --alpha",
        "ppl_eval": "--model_path --act_scales_path --smooth --alpha --quantize --dataset_name --dataset_config",
    }[module]
    assert not [each for each in arguments.split() if each not in done.stdout]


def test_opt_through_the_three_tools(opt: Path, text: Path, tmp_path: Path) -> None:
    scales = tmp_path / "scales" / "opt.pt"
    _tool(
        "generate-act-scales", "--model-name", opt, "--output-path", scales, "--num-samples", 12,
        "--seq-len", 32, "--dataset-path", text, "--per-gpu-batch-size", 4,
    )  # fmt: skip
    found = load_activation_scales(scales)
    model = transformers.AutoModelForCausalLM.from_pretrained(opt)
    texts = text.read_text().split("\n\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(opt)
    by_hand = compute_activation_scales(model, texts[:12], tokenizer=tokenizer, seq_len=32)
    documents = {name for name, value in found.items() if value.shape == by_hand[name].shape}
    assert documents == set(by_hand)

    out = tmp_path / "out"
    said = _tool(
        "export-int8-model",
        "--model_path",
        opt,
        "--output_path",
        out,
        "--act_scales_path",
        scales,
        "--alpha",
        0.85,
    )
    assert "18 layers" in said
    manifest = json.loads((out / "qwodel.manifest.json").read_text())
    assert (manifest["schema"], manifest["backend"], manifest["recipe"]["alpha"]) == (1, "smoothquant", 0.85)
    assert manifest["source"]["sha256"].keys() == {"model.safetensors"}
    assert {"config.json", "model.safetensors"} <= manifest["outputs"].keys()
    int8 = Int8OPTForCausalLM.from_pretrained(out)
    ids = torch.tensor([[5, 9, 13, 21, 33, 4]])
    with torch.no_grad():
        expected, result = model(ids).logits, int8(ids).logits
    assert float((result - expected).norm() / expected.norm()) < 0.1
    assert int8.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4).shape == (1, 10)

    plain = float(
        _tool("ppl-eval", "--model_path", opt, "--dataset_name", text, "--n_samples", 3).split()[-1]
    )
    said = _tool(
        "ppl-eval", "--model_path", opt, "--act_scales_path", scales, "--smooth", "--alpha", 0.85, "--quantize",
        "--dataset_name", text, "--n_samples", 3,
    )  # fmt: skip
    assert said.startswith("Perplexity: ")
    assert float(said.split()[-1]) == pytest.approx(plain, rel=0.1)
    assert float(said.split()[-1]) != plain


def test_the_same_tools_are_verbs(opt: Path, text: Path, tmp_path: Path) -> None:
    run = CliRunner()
    done = run.invoke(
        app,
        ["smoothquant", "generate-act-scales", "--model-name", str(opt), "--output-path", str(tmp_path / "s.pt"),
         "--dataset-path", str(text), "--num-samples", "4", "--seq-len", "16"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert load_activation_scales(tmp_path / "s.pt")
    assert "--act_scales_path" in run.invoke(app, ["smoothquant", "export-int8-model", "--help"]).output


def test_a_tool_says_what_is_wrong(opt: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qwodel.smoothquant.ppl_eval", "--model_path", str(opt), "--smooth"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--smooth needs --act_scales_path" in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluate_ppl_is_the_perplexity_and_leaves_the_model_alone(opt: Path, text: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(opt).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(opt)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids = tokenizer("\n\n".join(text.read_text().split("\n\n")), return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 16 * 16].reshape(-1, 16)[:5]
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    exact = math.exp(sum(losses) / len(losses))
    scales = compute_activation_scales(model, [windows])
    common = {"seq_len": 16, "num_samples": 5}
    plain = evaluate_ppl(model, str(text), scales, smooth=False, quantize=False, **common)  # type: ignore[arg-type]
    assert plain == pytest.approx(exact, rel=1e-4)
    smooth = evaluate_ppl(model, str(text), scales, 0.8, True, False, **common)  # type: ignore[arg-type]
    assert smooth == pytest.approx(exact, rel=1e-4)
    both = evaluate_ppl(model, str(text), scales, scheme=Scheme("tensor", "tensor"), **common)  # type: ignore[arg-type]
    assert both != plain
    assert both == pytest.approx(plain, rel=0.2)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_evaluate_ppl_refuses_what_it_cannot_do(opt: Path, text: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(opt)
    with pytest.raises(ConfigurationError, match="activation scales"):
        evaluate_ppl(model, str(text), None)
    with pytest.raises(RuntimeError, match="scales not found for layer"):
        evaluate_ppl(model, str(text), {}, seq_len=8)
    short = tmp_path / "short.txt"
    short.write_text("w1 w2")
    with pytest.raises(CalibrationError, match="window"):
        evaluate_ppl(model, str(short), None, smooth=False)
