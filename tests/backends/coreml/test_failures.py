"""What goes wrong, provoked for real: a typed error with cause and hint, nothing published, nothing left over."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qwodel import Quantizer
from qwodel.backends.coreml.checks import check_interface, check_size, check_weights
from qwodel.backends.coreml.fingerprints import SourceTensors
from qwodel.backends.coreml.formats import resolve
from qwodel.backends.coreml.mil.evaluate import Evaluator
from qwodel.backends.coreml.mil.program import Program
from qwodel.backends.coreml.options import CoreMLOptions
from qwodel.backends.coreml.weights import Weight, weights_of
from qwodel.exceptions import (
    Cancelled,
    ConfigurationError,
    ConversionError,
    FormatNotSupportedError,
    IntegrityError,
    QuantizationError,
    ResourceError,
    ValidationError,
)
from tests.backends.coreml.runs import Made, make


def _copy(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    file = target / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return target


def _nothing_in(folder: Path) -> bool:
    return not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("int4", {"deployment_target": "iOS17"}, ConfigurationError, "int4 needs iOS18"),
        ("int4", {"compute_units": "NPU"}, ConfigurationError, "compute_units"),
        ("int4", {"input_shape": (1, 2, 3)}, ConfigurationError, r"is not \(batch, tokens\)"),
        ("int4", {"seq_length": 4096}, ConfigurationError, "context of 128"),
        ("int4", {"exclude_ops": ("gathr",)}, ConfigurationError, "no MIL operation 'gathr'"),
        ("int4", {"exclude_ops": ("conv",)}, ConfigurationError, "no weight of this model goes into 'conv'"),
        (
            "int4",
            {"exclude_layers": ("lm_haed",)},
            ConfigurationError,
            "no weight of the model matches 'lm_haed'",
        ),
        ("int4", {"weight_threshold": 10**6}, ValidationError, "no weight that int4 would compress"),
        ("int5", {}, FormatNotSupportedError, "no format 'int5'"),
    ],
)
def test_options_that_cannot_be_met(
    tiny_llama: Path,
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    error: type[QuantizationError],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as caught:
        make(tiny_llama, tmp_path / "out", name, **options)
    assert caught.value.hint
    assert _nothing_in(tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "encoder with a decoder",
        ),
        ({"num_local_experts": 8}, "routes tokens to experts"),
        ({"architectures": ["LlamaForKausalLM"]}, "inputs and outputs are not known"),
        ({"architectures": ["NobodysForCausalLM"]}, "has no class NobodysForCausalLM"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
            "lacks 6 weights of Qwen2ForCausalLM",
        ),
    ],
)
def test_models_that_are_not_taken(
    tiny_llama: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    model = _copy(tiny_llama, tmp_path / "model", **config)
    with pytest.raises(ValidationError, match=message) as caught:
        make(model, tmp_path / "out", "float16")
    assert caught.value.hint
    assert _nothing_in(tmp_path / "out")


def test_a_state_dict_alone_is_no_model(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(4, 4)}, tmp_path / "weights.pt")
    with pytest.raises(ValidationError, match="takes a Hugging Face model directory or a TorchScript file"):
        Quantizer("coreml", tmp_path / "weights.pt")


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_weights_that_float16_cannot_hold_are_named(tiny_llama: Path, tmp_path: Path, value: float) -> None:
    model = _copy(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConversionError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has values that float16 cannot"
    ):
        make(model, tmp_path / "out", "int8_linear")
    assert _nothing_in(tmp_path / "out")


REMOTE = """
from pathlib import Path
import torch
from transformers import LlamaForCausalLM
Path({mark!r}).write_text("ran")

class OddMLP(torch.nn.Module):
    def forward(self, x):
        return x * torch.special.i0e(x)

class TalkativeMLP(torch.nn.Module):
    def forward(self, x):
        if torch.jit.is_tracing():
            raise RuntimeError("this layer cannot be traced")
        return x

class OddForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].mlp = {kind}()
"""


def _remote(tiny_llama: Path, folder: Path, kind: str) -> tuple[Path, Path]:
    mark = folder / "mark"
    auto_map = {"AutoModelForCausalLM": "odd.OddForCausalLM"}
    model = _copy(tiny_llama, folder / "model", architectures=["OddForCausalLM"], auto_map=auto_map)
    (model / "odd.py").write_text(REMOTE.format(mark=str(mark), kind=kind))
    return model, mark


def test_code_of_a_model_runs_only_when_asked_for(tiny_llama: Path, tmp_path: Path) -> None:
    model, mark = _remote(tiny_llama, tmp_path, "OddMLP")
    with pytest.raises(
        ValidationError, match="OddForCausalLM is Python code that comes with the model"
    ) as caught:
        make(model, tmp_path / "out", "float16")
    assert "trust_remote_code=True" in (caught.value.hint or "")
    assert not mark.exists()


def test_an_operator_of_a_model_is_named_with_its_layer(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, mark = _remote(tiny_llama, tmp_path, "OddMLP")
    with pytest.raises(
        ConversionError, match=r"operator special_i0e \(in .*layers\.1\.mlp, a OddMLP\)"
    ) as caught:
        make(model, tmp_path / "out", "float16", trust_remote_code=True)
    assert mark.exists()
    assert isinstance(caught.value.__cause__, NotImplementedError)
    assert _nothing_in(tmp_path / "out")


def test_a_layer_that_cannot_be_traced_is_named(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, _ = _remote(tiny_llama, tmp_path, "TalkativeMLP")
    message = r"cannot be traced: this layer cannot be traced \(in model\.layers\.1\.mlp, a TalkativeMLP\)"
    with pytest.raises(ConversionError, match=message):
        make(model, tmp_path / "out", "float16", trust_remote_code=True)
    assert _nothing_in(tmp_path / "out")


@pytest.mark.parametrize("stage", ["resolve", "convert", "quantize", "verify", "publish"])
def test_a_raising_callback_cancels_in_every_stage(tiny_llama: Path, tmp_path: Path, stage: str) -> None:
    def callback(percent: int, now: str, message: str) -> None:
        if now == stage and (stage != "convert" or "pipeline" in message):
            raise RuntimeError("enough")

    with pytest.raises(Cancelled, match="enough"):
        make(tiny_llama, tmp_path / "out", "int4", progress_callback=callback)
    assert _nothing_in(tmp_path / "out")


def test_an_existing_output_is_not_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    first = make(tiny_llama, tmp_path, "float16")
    before = first.package.stat().st_mtime_ns
    with pytest.raises(ValidationError, match="exists already"):
        make(tiny_llama, tmp_path, "float16")
    assert first.package.stat().st_mtime_ns == before
    make(tiny_llama, tmp_path, "float16", overwrite=True)


def test_a_disk_too_small_is_refused_before_the_start(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match="needs about"):
        make(tiny_llama, tmp_path / "out", "float16")


STARVED = """
import resource, sys
from qwodel import Quantizer, ResourceError
from qwodel.backends.coreml import build, compress, verify
import transformers.models.llama.modeling_llama
quantizer = Quantizer("coreml", sys.argv[1], sys.argv[2])
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 40_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    quantizer.quantize("float16")
except ResourceError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_too_little_memory_is_a_resource_error(stories15m: Path, tmp_path: Path) -> None:
    """60 MB of float32 weights do not go into 40."""
    command = [sys.executable, "-c", STARVED, str(stories15m), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "memory ran out while" in done.stdout, done.stderr[-2000:]
    assert _nothing_in(tmp_path / "out")


def test_without_coremltools_the_command_says_what_to_install(tiny_llama: Path, tmp_path: Path) -> None:
    """sys.modules[name] = None is what Python takes for "cannot be imported"."""
    program = (
        "import sys; sys.modules['coremltools'] = None\n"
        f"sys.argv[1:] = ['quantize', {str(tiny_llama)!r}, '-b', 'coreml', '-f', 'int4', '-o', {str(tmp_path)!r}]\n"
        "from qwodel.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "the coreml backend needs coremltools" in done.stderr
    assert "hint: pip install 'coremltools<10,>=9.0'" in done.stderr


@pytest.fixture(scope="session")
def sound(short_stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    out = tmp_path_factory.mktemp("sound")
    return {
        name: make(short_stories, out, name, granularity="per_tensor") for name in ("int4", "int8_symmetric")
    } | {"float16": make(short_stories, out, "float16", deployment_target="iOS18")}


def _check(sound: dict[str, Made], name: str, package: Path, short_stories: Path) -> None:
    options = CoreMLOptions(granularity="per_tensor")
    model = transformers.AutoModelForCausalLM.from_pretrained(short_stories, dtype=torch.float32)
    original, recipe = sound["float16"].program, resolve(name, options)
    # The tables of positions are the wrapper's: leave them out by their names.
    weights = [
        Weight(
            w.name, w.parameters, w.shape, w.operations, w.kept or ("table" if "table" in w.name else None)
        )
        for w in weights_of(original, SourceTensors.of(model, 2048), options)
    ]
    checks = check_weights(original, Program(package), weights, recipe, 2048)
    check_size(Program(package), weights, checks, recipe, 2048)


@pytest.mark.parametrize("name", ["int4", "int8_symmetric"])
def test_changed_bytes_in_the_weights_are_found(
    sound: dict[str, Made], short_stories: Path, tmp_path: Path, name: str
) -> None:
    """A hundred bytes in a quarter of the file: no header, no length, only codes."""
    package = tmp_path / "copy.mlpackage"
    shutil.copytree(sound[name].package, package)
    _check(sound, name, package, short_stories)
    file = package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    data = np.fromfile(file, np.uint8)
    data[len(data) // 4 :][:100] ^= 0b0110_0110
    data.tofile(file)
    with pytest.raises(IntegrityError, match="was not stored as"):
        _check(sound, name, package, short_stories)


def test_a_package_of_another_kind_is_found(sound: dict[str, Made], short_stories: Path) -> None:
    with pytest.raises(IntegrityError, match="should have been compressed to 4-bit palettes"):
        _check(sound, "int4", sound["int8_symmetric"].package, short_stories)
    with pytest.raises(IntegrityError, match="should have been compressed"):
        _check(sound, "int4", sound["float16"].package, short_stories)
    inputs = {"input_ids": "int32", "attention_mask": "int32"}
    right = (inputs, {"logits": "float16"}, 0, "CoreML8")
    check_interface(sound["int4"].program, *right)
    for position, wrong in enumerate(({"input_ids": "int32"}, {"logits": "float32"}, 2, "CoreML6")):
        with pytest.raises(IntegrityError):
            check_interface(sound["int4"].program, *right[:position], wrong, *right[position + 1 :])
    with pytest.raises(IntegrityError, match="outputs"):
        check_interface(sound["int4"].program, inputs, {"scores": "float16"}, 0, "CoreML8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "Manifest.json").write_text("{}"), "is no package manifest"),
        (lambda p: (p / "Data/com.apple.CoreML/model.mlmodel").unlink(), "has no model file"),
        (
            lambda p: (p / "Data/com.apple.CoreML/model.mlmodel").write_bytes(b"\xff" * 64),
            "is not a Core ML model",
        ),
        (lambda p: (p / "Data/com.apple.CoreML/weights/weight.bin").unlink(), "has no file"),
        (
            lambda p: os.truncate(p / "Data/com.apple.CoreML/weights/weight.bin", 5000),
            "is damaged|is truncated",
        ),
        (lambda p: os.truncate(p / "Data/com.apple.CoreML/weights/weight.bin", 0), "is truncated"),
    ],
)
def test_a_damaged_package_is_an_integrity_error(
    sound: dict[str, Made], tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    package = tmp_path / "copy.mlpackage"
    shutil.copytree(sound["int4"].package, package)
    damage(package)
    with pytest.raises(IntegrityError, match=message):
        Evaluator(Program(package))


def test_outliers_that_ruin_a_format_are_refused(short_stories: Path, tmp_path: Path) -> None:
    """Sixteen even steps over a matrix with outliers keep next to nothing of it."""
    with pytest.raises(
        IntegrityError, match="int4 keeps only .* dB of model.layers.0.self_attn.o_proj"
    ) as caught:
        make(short_stories, tmp_path / "out", "int4", mode="uniform", granularity="per_tensor")
    assert "exclude_layers=['model.layers.0.self_attn.o_proj.weight']" in (caught.value.hint or "")
    assert _nothing_in(tmp_path / "out")


def test_values_beyond_float16_are_reported_with_a_way_out(tiny_llama: Path, tmp_path: Path) -> None:
    """Activations of 300 have squares that float16 does not hold: the norm's mean becomes infinite."""
    model = _copy(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 30_000
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="float16's range") as caught:
        make(model, tmp_path / "out", "float16")
    assert "float32_ops" in (caught.value.hint or "")
    made = make(model, tmp_path / "out", "float16", float32_ops=("pow", "reduce_mean", "rsqrt", "mul", "add"))
    assert made.info["evaluated"]["relative_error"] < 0.05
