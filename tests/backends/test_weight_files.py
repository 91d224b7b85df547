from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwodel.checkpoint.run.carry_out as carry_out
import qwodel.checkpoint.run.tensor_work as tensor_work
from qwodel.backends.fp8 import FP8Quantizer
from qwodel.backends.int8 import INT8Quantizer
from qwodel.checkpoint.run.pipeline import PipelineExecutor
from qwodel.checkpoint.run.tensor_compute import compute_tensor
from qwodel.checkpoint.tensors import TensorPlan
from qwodel.exceptions import ConfigurationError, FormatNotSupportedError, ValidationError
from qwodel.quantizer import Quantizer
from qwodel.source import inspect_source
from tests.checkpoint.checkpoints import llama_weights, save_sharded

LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_sharded(tmp_path / "tiny", llama_weights(2), 2)
    (tmp_path / "tiny" / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    (tmp_path / "tiny" / "tokenizer.json").write_text("{}")
    return tmp_path / "tiny"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(llama_weights(2), tmp_path / "bare.safetensors")
    return tmp_path / "bare.safetensors"


@pytest.mark.parametrize(
    ("backend", "formats"),
    [
        (FP8Quantizer, ["fp8_e4m3", "fp8_e4m3_row", "fp8_e4m3_block", "fp8_e5m2", "mxfp8"]),
        (INT8Quantizer, ["int8_row", "int8_convrot", "int8_quip", "int8_tensor", "int8_block", "fp16"]),
    ],
)
def test_formats(backend: type[FP8Quantizer], formats: list[str]) -> None:
    assert list(backend.formats()) == formats
    loud = [spec for spec in backend.formats().values() if "block" in spec.name]
    assert all("NOT loadable" in spec.description for spec in loud)


def test_a_directory_becomes_a_directory_with_a_manifest(directory: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, str]] = []
    quantizer = Quantizer(
        "int8", directory, tmp_path / "out", lambda percent, stage, _: seen.append((percent, stage))
    )
    path = quantizer.quantize("int8-row")
    assert path == tmp_path / "out" / "tiny-int8_row"
    assert {"config.json", "tokenizer.json", "model.safetensors", "qwodel.manifest.json"} == {
        f.name for f in path.iterdir()
    }
    assert load_file(path / "model.safetensors")[f"{LAYER}.weight"].dtype == torch.int8
    manifest = json.loads((path / "qwodel.manifest.json").read_text())
    assert len(manifest["quality"]) == 8
    assert min(manifest["sqnr_db"].values()) > 35
    assert manifest["family"]["name"] == "llm"
    assert manifest["kept"]["lm_head.weight"].startswith("safe default")
    assert seen[-1] == (100, "complete")
    assert [percent for percent, _ in seen] == sorted(percent for percent, _ in seen)
    assert {"quantize", "verify", "publish"} <= {stage for _, stage in seen}


def test_a_file_becomes_a_file(single: Path, tmp_path: Path) -> None:
    path = Quantizer("fp8", single, tmp_path / "out").quantize("fp8_e4m3")
    assert path == tmp_path / "out" / "bare-fp8_e4m3.safetensors"
    assert f"{LAYER}.comfy_quant" in load_file(path)
    assert path.with_name("bare-fp8_e4m3.manifest.json").exists()


def test_layout_can_be_chosen(directory: Path, tmp_path: Path) -> None:
    path = Quantizer("fp8", directory, tmp_path / "out", layout="comfyui").quantize("fp8_e5m2")
    assert path.suffix == ".safetensors"


@pytest.mark.parametrize("optimizer", ["none", "search", "original"])
def test_every_optimizer_gives_the_same_bytes_with_any_workers(
    single: Path, tmp_path: Path, optimizer: str
) -> None:
    digests = set()
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        path = Quantizer("fp8", single, out, optimizer=optimizer, workers=workers).quantize("fp8_e4m3_row")
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_device_that_is_not_there_is_refused_before_work(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="'cuda:1' is not there") as caught:
        Quantizer("int8", single, tmp_path / "out", device="cuda:1").quantize("int8_row")
    assert caught.value.hint
    quantizer = Quantizer("int8", single, tmp_path / "out", device="auto")
    quantizer.quantize("int8_row")
    info = quantizer.get_model_info()
    assert (info["device"], info["fell_back_to_cpu"]) == ("cpu", [])


def test_what_the_device_could_not_take_is_in_the_manifest(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline whose first attempt at one layer runs out of memory, in place of a GPU."""
    failed: list[str] = []

    def compute(plan: TensorPlan, *arguments: Any) -> Any:
        if plan.name == f"{LAYER}.weight" and not failed:
            failed.append(plan.name)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (yield from compute_tensor(plan, *arguments))

    monkeypatch.setattr(tensor_work, "compute_tensor", compute)
    monkeypatch.setattr(carry_out, "executor_for", lambda device, *_: PipelineExecutor(device))
    path = Quantizer("int8", single, tmp_path / "out").quantize("int8_row")
    manifest = json.loads(path.with_name("bare-int8_row.manifest.json").read_text())
    assert manifest["fell_back_to_cpu"] == [f"{LAYER}.weight"]
    assert manifest["device"] == "cpu"


def test_dry_run_knows_the_size(single: Path, tmp_path: Path) -> None:
    backend = INT8Quantizer()
    plan = backend.plan(inspect_source(single), backend.find_format("int8"), backend.parse_options({}))
    path = Quantizer("int8", single, tmp_path / "out").quantize("int8_row")
    assert plan.output_bytes == path.stat().st_size
    assert f"{LAYER}.weight" in plan.table()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"optimizer": "none", "num_iter": 5}, "num_iter"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"custom_layers": "x"}, "custom_format"),
        ({"filters": ("flx",)}, "flx"),
        ({"block_size": 64}, "no blocks"),
        ({"input_scale": True}, "comfyui layout"),
        ({"layer_config": {"layer_pattern": {}}}, "layer_pattern"),
        ({"optimizer": "original", "top_p": 2.0}, "top_p"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_bad_options_are_named(
    directory: Path, tmp_path: Path, options: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigurationError, match=named):
        Quantizer("int8", directory, tmp_path / "out", **options).quantize("int8_row")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_what_a_layout_cannot_express_is_said_at_once(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="E5M2"):
        Quantizer("fp8", directory, tmp_path / "out").quantize("fp8_e5m2")
    with pytest.raises(FormatNotSupportedError):
        Quantizer("fp8", directory, tmp_path / "out").quantize("fp9")


def test_a_failure_publishes_nothing(single: Path, tmp_path: Path) -> None:
    weights = llama_weights(2)
    weights[f"{LAYER}.weight"][0, 0] = torch.nan
    save_file(weights, single)
    with pytest.raises(ValidationError, match="down_proj"):
        Quantizer("int8", single, tmp_path / "out").quantize("int8_row")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    path = Quantizer("int8", single, tmp_path / "out", nonfinite="keep").quantize("int8_row")
    assert load_file(path)[f"{LAYER}.weight"].dtype == torch.bfloat16


def test_a_model_of_conv1d_layers_says_why_nothing_is_quantized(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=100, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValidationError, match=r"4 × stored \[in, out\] \(Conv1D\)"):
        Quantizer("int8", tmp_path / "gpt2", tmp_path / "out").quantize("int8_row")
    assert not (tmp_path / "out").exists()
