"""The weight-file backends with calibration data, on real weights: what is published is better, and loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwodel import Quantizer
from qwodel.exceptions import CalibrationError, ConfigurationError, ValidationError
from qwodel.int8 import read_weights

pytestmark = pytest.mark.slow

SAMPLES = {"num_samples": 12, "seq_length": 128}


@pytest.fixture(scope="module")
def text(wikitext: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text; what is scored on comes from another file."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(wikitext.read_text("utf-8")[:200_000], "utf-8")
    return path


@pytest.fixture(scope="module")
def judge(stories15m: Path, wikitext: Path) -> Any:
    """Mean KL divergence from the source model, on held-out text."""
    model = AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories15m)
    ids = tokenizer(
        (wikitext.parent / "wiki.test.raw").read_text("utf-8")[:20_000], return_tensors="pt"
    ).input_ids
    ids = ids[0, : 8 * 128].reshape(8, 128)
    original = {name: each.clone() for name, each in model.state_dict().items()}
    with torch.no_grad():
        reference = model(ids).logits.log_softmax(dim=-1)

    def divergence(path: Path) -> float:
        weights = {name: each.float() for name, each in read_weights(path) if name in original}
        model.load_state_dict(original | weights)
        with torch.no_grad():
            found = model(ids).logits.log_softmax(dim=-1)
        return float((reference.exp() * (reference - found)).sum(dim=-1).mean())

    return divergence


def quantize(model: Path, output: Path, kind: str, **options: Any) -> tuple[Path, dict[str, Any]]:
    quantizer = Quantizer(kind.split("_")[0], str(model), str(output), **options)
    path = quantizer.quantize(kind)
    manifest = json.loads(Path(quantizer.get_model_info()["manifest"]).read_text("utf-8"))
    return path, manifest


@pytest.mark.parametrize("kind", ["int8_row", "fp8_e4m3", "int8_convrot"])
def test_the_whole_model_is_nearer_to_its_source(kind, stories15m, text, judge, tmp_path):
    plain, _ = quantize(stories15m, tmp_path / "plain", kind, layout="comfyui")
    events: list[tuple[int, str, str]] = []
    aware = Quantizer(
        kind.split("_")[0], str(stories15m), str(tmp_path / "aware"),
        progress_callback=lambda *event: events.append(event),
        layout="comfyui", calibration_dataset=str(text), **SAMPLES,
    )  # fmt: skip
    path = aware.quantize(kind)
    assert judge(path) < 0.75 * judge(plain)
    percents = [percent for percent, _, _ in events]
    assert percents == sorted(percents)
    assert len({percent for percent, stage, _ in events if stage == "calibrate"}) > 10
    manifest = json.loads((path.parent / f"{path.stem}.manifest.json").read_text("utf-8"))
    reports = manifest["rounding"]
    assert len(reports) == 42
    assert {each["method"] for each in reports.values()} == {"gptq"}
    assert {each["tokens"] for each in reports.values()} == {12 * 128}
    assert all(each["output_sqnr_db"] >= each["nearest_sqnr_db"] for each in reports.values())


def test_making_up_for_earlier_layers_helps_the_whole_model(stories15m, text, judge, tmp_path):
    options = {"layout": "comfyui", "calibration_dataset": str(text), "num_samples": 48, "seq_length": 128}
    plain, _ = quantize(stories15m, tmp_path / "gptq", "fp8_e4m3", **options)
    better, manifest = quantize(stories15m, tmp_path / "gptaq", "fp8_e4m3", optimizer="gptaq", **options)
    assert {each["method"] for each in manifest["rounding"].values()} == {"gptaq"}
    assert judge(better) < 0.9 * judge(plain)


def test_token_ids_need_no_tokenizer(stories15m, tmp_path):
    bare = tmp_path / "model"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(stories15m / name, bare / name)
    ids = [[(7 * n + m) % 3000 + 3 for m in range(64)] for n in range(8)]
    options = {"num_samples": 8, "seq_length": 64, "layout": "comfyui"}
    _, manifest = quantize(bare, tmp_path / "out", "int8_row", calibration_dataset=ids, **options)
    assert {each["tokens"] for each in manifest["rounding"].values()} == {512}
    with pytest.raises(ValidationError, match="no tokenizer that loads"):
        quantize(bare, tmp_path / "text", "int8_row", calibration_dataset=["some text"] * 99, **options)


def test_directories_load_in_transformers_and_write(stories15m, text, tmp_path):
    path, _ = quantize(stories15m, tmp_path, "int8_row", calibration_dataset=str(text), **SAMPLES)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    source = AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = tokenizer("Once upon a time, there was", return_tensors="pt")
    settings = {"max_new_tokens": 20, "do_sample": False}
    written = tokenizer.decode(model.generate(**prompt, **settings)[0])
    assert written == tokenizer.decode(source.generate(**prompt, **settings)[0])


def test_statistics_that_were_kept_serve_as_well(stories15m, text, judge, tmp_path):
    from qwodel.modeling.calibrated import collect_from_checkpoint
    from qwodel.modeling.calibration_batches import CalibrationOptions

    options = CalibrationOptions(str(text), 12, 128)
    stats = collect_from_checkpoint(stories15m, tmp_path / "stats.safetensors", options)
    plain, _ = quantize(stories15m, tmp_path / "plain", "int8_row", layout="comfyui")
    for workers in (1, 2):
        path, manifest = quantize(
            stories15m, tmp_path / f"aware{workers}", "int8_row",
            layout="comfyui", calibration_data_path=str(stats), workers=workers,
        )  # fmt: skip
        assert judge(path) < 0.75 * judge(plain)
        assert {each["method"] for each in manifest["rounding"].values()} == {"gptq"}
    one, two = (tmp_path / f"aware{n}" / path.name for n in (1, 2))
    assert one.read_bytes() == two.read_bytes()


def test_texts_from_python_are_used_and_not_repeated_in_the_manifest(stories15m, text, tmp_path):
    documents = text.read_text("utf-8").split("\n \n")[:400]
    _, manifest = quantize(
        stories15m, tmp_path, "int8_row",
        calibration_dataset=iter(documents), token="hf_secret", num_samples=4, seq_length=64,
    )  # fmt: skip
    assert {each["tokens"] for each in manifest["rounding"].values()} == {256}
    assert manifest["recipe"]["calibration_dataset"] == f"{len(documents)} items given in Python"
    assert "hf_secret" not in json.dumps(manifest)
    assert documents[1][:40] not in json.dumps(manifest, ensure_ascii=False)


def test_runs_repeat(stories15m, text, tmp_path):
    files = [
        quantize(
            stories15m, tmp_path / str(n), "int8_row", layout="comfyui", calibration_dataset=str(text), **SAMPLES
        )[0]
        for n in (1, 2)
    ]  # fmt: skip
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration_data_path": "x", "calibration_dataset": "y"}, "not both"),
        ({"calibration_dataset": "y", "optimizer": "none"}, "no use of calibration data"),
        ({"num_samples": 3}, "num_samples belong to calibration_dataset"),
        ({"damping": 0.1}, "damping belong to gptq"),
        ({"calibration_dataset": "y", "num_iter": 3}, "num_iter belong to learned"),
        ({"calibration_data_path": "x", "optimizer": "gptaq"}, "statistics know nothing of"),
        ({"calibration_dataset": "y", "optimizer": "gptaq", "num_iter": 3}, "num_iter belong to learned"),
    ],
)
def test_options_without_effect_are_refused(stories15m, tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        quantize(stories15m, tmp_path, "int8_row", **options)
    assert list(tmp_path.iterdir()) == []


def test_failures_leave_nothing(stories15m, text, tmp_path):
    with pytest.raises(CalibrationError, match="too small"):
        quantize(stories15m, tmp_path, "int8_row", calibration_dataset=str(text), num_samples=10_000)
    with pytest.raises(CalibrationError, match="does not exist"):
        quantize(stories15m, tmp_path, "int8_row", calibration_dataset="missing.txt")
    with pytest.raises(CalibrationError, match="no statistics file"):
        quantize(stories15m, tmp_path, "int8_row", calibration_data_path=str(tmp_path / "none"))
    weights = next(stories15m.glob("*.safetensors"))
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        quantize(weights, tmp_path, "int8_row", calibration_dataset=str(text))
    assert list(tmp_path.iterdir()) == []


def test_without_data_gptq_says_what_it_does_instead(stories15m, tmp_path, caplog):
    _, manifest = quantize(stories15m, tmp_path, "int8_row", optimizer="gptq")
    assert "no calibration data" in caplog.text
    assert {layer["rounding"] for layer in manifest["quality"]} == {"nearest"}
