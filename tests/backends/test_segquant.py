"""The SegQuant backend: directories that load in one call, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

diffusers = pytest.importorskip("diffusers")

import torch  # noqa: E402

from qwodel import Quantizer  # noqa: E402
from qwodel.exceptions import CalibrationError, ConfigurationError, IntegrityError, ValidationError  # noqa: E402
from qwodel.modules.segment_linear import SegmentLinear  # noqa: E402
from qwodel.segquant import load_quantized  # noqa: E402

INPUTS = [{"class_labels": [1, 2]}, {"class_labels": [3, 0]}]
QUICK: dict[str, Any] = {
    "calibration_inputs": INPUTS,
    "pipeline_arguments": {"num_inference_steps": 3, "guidance_scale": 1.0},
    "timesteps_per_sample": 2,
    "alpha": 0.5,
    "low_rank": 4,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DiT pipeline on disk."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    made = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    folder = tmp_path_factory.mktemp("dit") / "tiny-dit"
    made.save_pretrained(folder)
    (folder / "README.md").write_text("about")
    return folder


def sample(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return torch.from_numpy(
        pipe(
            class_labels=[1], num_inference_steps=3, guidance_scale=1.0, generator=generator, output_type="np"
        ).images
    )


def test_a_pipeline_in_and_a_pipeline_out(pipeline: Path, tmp_path: Path) -> None:
    events: list[tuple[int, str, str]] = []
    quantizer = Quantizer(
        "segquant", str(pipeline), tmp_path, progress_callback=lambda *event: events.append(event), **QUICK
    )
    folder = quantizer.quantize("w8a8")
    info = quantizer.get_model_info()
    assert folder.name == "tiny-dit-w8a8_dynamic"
    assert (folder / "README.md").read_text() == "about"
    assert info["quality"]["worst"]["sqnr"] > 25
    assert info["outputs_sqnr"] > 20
    assert info["bits_per_weight"] < 24  # scales, branches and embeddings weigh much in a model this small
    assert info["seams"] > 4
    assert {stage for _, stage, _ in events} >= {"calibrate", "quantize", "verify", "publish", "complete"}
    loaded = load_quantized(folder)
    layer = loaded.transformer.transformer_blocks[0].attn1.to_q
    assert isinstance(layer, SegmentLinear)
    assert layer.real
    assert layer.products()[0].weight.codes.dtype == torch.int8
    exact = sample(diffusers.DiTPipeline.from_pretrained(pipeline))
    found = sample(loaded)
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.05
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "segquant"
    with pytest.raises((ValueError, OSError)):
        diffusers.DiTPipeline.from_pretrained(folder)


def test_a_model_alone_with_a_stored_calibration_set(pipeline: Path, tmp_path: Path) -> None:
    from qwodel.segquant.recording import generate_calibrate_set
    from qwodel.segquant.samplers import UniformSampler

    pipe = diffusers.DiTPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    generate_calibrate_set(
        pipe, UniformSampler(timestep_per_sample=2), INPUTS, pipe.transformer, tmp_path / "set",
        num_inference_steps=3, guidance_scale=1.0, compress=False,
    )  # fmt: skip
    quantizer = Quantizer(
        "segquant", str(pipeline / "transformer"), tmp_path, calibration_set=str(tmp_path / "set"),
        optimum="default", calibrate="amax", search_range=False, skip=["*.attn1.to_q"], conv=True,
    )  # fmt: skip
    folder = quantizer.quantize("w4a8")
    model = load_quantized(folder)
    block = model.transformer_blocks[0].attn1
    assert isinstance(block.to_q, torch.nn.Linear)
    assert block.to_k.products()[0].weight.codes.dtype == torch.uint8
    info = quantizer.get_model_info()
    assert info["kept"]["transformer_blocks.0.attn1.to_q"] == "enable is off"
    assert info["architecture"] == "DiTTransformer2DModel"
    assert (folder / "qwodel.manifest.json").is_file()


def test_what_is_read_back_is_compared(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qwodel.segquant.export as export

    def damaged(path: Path, **options: Any) -> Any:
        found = load_quantized(path)
        found.transformer.transformer_blocks[0].attn1.to_q.products()[0].weight.codes[0, 0] += 1
        return found

    monkeypatch.setattr(export, "load_quantized", damaged)
    with pytest.raises(IntegrityError, match="1 tensors differ"):
        Quantizer("segquant", str(pipeline), tmp_path, **QUICK).quantize("w8a8")
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_what_cannot_be_is_refused_before_work_starts(pipeline: Path, smollm2: Path, tmp_path: Path) -> None:
    def run(source: Path = pipeline, **options: Any) -> None:
        Quantizer("segquant", str(source), tmp_path / "out", **options).quantize("w8a8")

    with pytest.raises(CalibrationError, match="needs calibration data"):
        run()
    with pytest.raises(CalibrationError, match="without a pipeline"):
        run(pipeline / "transformer", calibration_inputs=INPUTS)
    with pytest.raises(CalibrationError, match="is no calibration set"):
        run(calibration_set=str(tmp_path))
    with pytest.raises(CalibrationError, match="hold no inputs"):
        run(calibration_inputs=[])
    with pytest.raises(CalibrationError, match="not readable"):
        run(calibration_inputs=str(tmp_path / "none.txt"))
    with pytest.raises(ConfigurationError, match="alpha lies in"):
        run(calibration_inputs=INPUTS, alpha=2.0)
    with pytest.raises(ConfigurationError, match="low_rank belongs to optimum svd"):
        run(calibration_inputs=INPUTS, optimum="smooth", low_rank=3)
    with pytest.raises(ConfigurationError, match="conv would be settings of config"):
        run(calibration_inputs=INPUTS, config={"default": {}}, conv=True)
    with pytest.raises(ConfigurationError, match=r"no setting 'default\.opt\.rank'"):
        run(calibration_inputs=INPUTS, config={"default": {"opt": {"rank": 3}}})
    with pytest.raises(ConfigurationError, match="no readable JSON"):
        run(calibration_inputs=INPUTS, config="nowhere.json")
    with pytest.raises(ValidationError, match="no model or pipeline of diffusers"):
        run(smollm2, calibration_inputs=INPUTS)
    with pytest.raises(ConfigurationError, match="belong to calibration_inputs"):
        (tmp_path / "meta.json").write_text("{}")
        run(calibration_set=str(tmp_path), seed=3)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_prompts_come_from_files_too(tmp_path: Path) -> None:
    from qwodel.backends.segquant import sampling_inputs

    (tmp_path / "p.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "height": 64}\n')
    assert sampling_inputs(str(tmp_path / "p.txt")) == [{"prompt": "a cat"}, {"prompt": "a dog"}]
    assert sampling_inputs(tmp_path / "p.jsonl") == [{"prompt": "a cat", "height": 64}]
    assert sampling_inputs(["a"]) == [{"prompt": "a"}]
