from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwodel.checkpoint.formats.registry import storage_format
from qwodel.checkpoint.layouts.transformers import TransformersLayout
from qwodel.checkpoint.plan.layer_config import LayerConfig
from qwodel.checkpoint.plan.recipe import LayerOverride
from qwodel.exceptions import ConfigurationError
from tests.checkpoint.checkpoints import DATA, run, sqnr

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

STORIES = DATA / "stories15M"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, tie_word_embeddings=request.param, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    return folder


def load(folder: Path) -> torch.nn.Module:
    """As a user loads it, then with its weights as numbers."""
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    )
    return model


@pytest.mark.parametrize(
    "name", ["fp8_e4m3", "fp8_e4m3_row", "fp8_e4m3_block", "int8_tensor", "int8_row", "int8_block"]
)
def test_transformers_decodes_to_what_is_reported(llama: Path, tmp_path: Path, name: str) -> None:
    # These layers are narrower than a block, which activation groups cannot follow.
    layout = TransformersLayout("none" if name.endswith("block") else "dynamic")
    _, quality = run(llama, tmp_path / "out", layout, format=name)
    weights = dict(load(tmp_path / "out").named_parameters())
    source = load_file(llama / "model.safetensors")
    assert len(quality) == 14
    for key, weight in source.items():
        if key in quality:
            assert sqnr(weight.float(), weights[key]) == pytest.approx(quality[key].sqnr_db, abs=0.05)
        else:
            assert torch.equal(weights[key].to(weight.dtype), weight)


def test_embeddings_are_tied_as_in_the_source(llama: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "out", TransformersLayout())
    tied = json.loads((llama / "config.json").read_text())["tie_word_embeddings"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in saved) is not tied
    model = load(tmp_path / "out")
    same = model.get_input_embeddings().weight is model.get_output_embeddings().weight  # type: ignore[operator]
    assert same is tied


def test_side_files_come_along_and_other_weights_do_not(llama: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "out", TransformersLayout())
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "chat_template.jinja", "model.safetensors"} <= names
    assert "pytorch_model.bin" not in names


def test_a_side_file_that_leads_out_is_left_behind(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    (tmp_path / "secret").write_text("PRIVATE KEY")
    (source / "notes.md").symlink_to(tmp_path / "secret")
    run(source, tmp_path / "out", TransformersLayout())
    assert not (tmp_path / "out" / "notes.md").exists()
    assert "lead out of the model's folder: notes.md" in caplog.text


def test_mixed_formats_load(llama: Path, tmp_path: Path) -> None:
    rules = LayerConfig.from_mapping(
        {"layer_patterns": {"down_proj": {"format": "fp8_e4m3_row"}, r"layers\.0\..*o_proj": {"skip": True}}}
    )
    _, quality = run(llama, tmp_path / "out", TransformersLayout(), format="int8_row", layer_config=rules)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert "model.layers.0.self_attn.o_proj" in config["ignore"]
    weights = dict(load(tmp_path / "out").named_parameters())
    source = load_file(llama / "model.safetensors")
    for key, found in quality.items():
        assert sqnr(source[key].float(), weights[key]) == pytest.approx(found.sqnr_db, abs=0.05)


def test_several_shards_load(llama: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "out", TransformersLayout(), max_shard_size=60_000)
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    total = sum(
        t.numel() * t.element_size() for shard in shards for t in load_file(tmp_path / "out" / shard).values()
    )
    assert index["metadata"]["total_size"] == total
    load(tmp_path / "out")


def test_what_vllm_cannot_run_is_said() -> None:
    layout = TransformersLayout()
    assert layout.support(storage_format("int8_row")).loads
    assert layout.support(storage_format("fp8_e4m3_block")).loads
    assert not layout.support(storage_format("fp8_e4m3_block", 64)).loads
    assert not layout.support(storage_format("int8_block")).loads
    assert not TransformersLayout("none").support(storage_format("int8_row")).loads
    with pytest.raises(ConfigurationError, match="E5M2"):
        layout.support(storage_format("fp8_e5m2"))


def test_no_config_no_transformers_layout(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "bare.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        run(tmp_path / "bare.safetensors", tmp_path / "out", TransformersLayout())


def test_transposed_conv1d_weights_stay(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=48, n_layer=1, n_head=4, vocab_size=100, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match=r"4 × stored \[in, out\]"):
        run(tmp_path / "in", tmp_path / "out", TransformersLayout())


def test_a_linear_beside_conv1d_layers_is_quantized_and_loads(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        n_embd=48, n_layer=1, n_head=4, vocab_size=100, n_positions=32, num_labels=8, pad_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "in")
    custom = LayerOverride("score", storage_format("int8_row"))
    conversion, quality = run(
        tmp_path / "in", tmp_path / "out", TransformersLayout("none"), custom_layers=custom
    )
    assert list(quality) == ["score.weight"]
    reasons = {each.name: each.reason for each in conversion.plan.tensors}
    assert sum("Conv1D" in reason for reason in reasons.values()) == 4
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert sqnr(model(ids).logits, loaded(ids).logits) > 35


def mixture(kind: str, folder: Path) -> Path:
    """A tiny mixture of experts, saved as transformers saves them: one matrix an expert."""
    torch.manual_seed(0)
    common = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 100, "num_experts_per_tok": 2,
    }  # fmt: skip
    if kind == "mixtral":
        config = transformers.MixtralConfig(intermediate_size=96, num_local_experts=4, **common)
    else:
        config = transformers.Qwen3MoeConfig(
            intermediate_size=64, moe_intermediate_size=32, num_experts=4, head_dim=16, **common
        )
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    """Logits of a model as it loads; every tensor of the file must have found its place."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(found.values()), found
    with torch.no_grad():
        output: torch.Tensor = model(torch.arange(1, 33)[None]).logits.float()
    return output


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e4m3_row"])
def test_experts_stored_one_by_one_are_quantized_and_load(tmp_path: Path, kind: str, name: str) -> None:
    source = mixture(kind, tmp_path / "in")
    _, quality = run(source, tmp_path / "out", TransformersLayout("none"), format=name)
    assert sum(".experts." in key for key in quality) == 24
    assert len(quality) == 32
    assert sqnr(logits(source), logits(tmp_path / "out")) > 25


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", ["int8_row", "int8_tensor", "fp8_e4m3_block"])
def test_experts_that_transformers_cannot_read_stay(tmp_path: Path, kind: str, name: str) -> None:
    source = mixture(kind, tmp_path / "in")
    size = 32 if "block" in name else None
    conversion, quality = run(
        source, tmp_path / "out", TransformersLayout("none"), format=name, block_size=size
    )
    assert len(quality) == 8
    assert not any(".experts." in key for key in quality)
    assert any("24 weights" in warning and "experts" in warning for warning in conversion.plan.warnings)
    assert sqnr(logits(source), logits(tmp_path / "out")) > 20


@pytest.mark.parametrize("by", ["fallback", "layer_config"])
def test_int8_layers_and_fp8_experts_load_together(tmp_path: Path, by: str) -> None:
    source = mixture("qwen3_moe", tmp_path / "in")
    rules = LayerConfig.from_mapping({"layer_patterns": {"experts": {"format": "fp8_e4m3_row"}}})
    extra = {"fallback": storage_format("fp8_e4m3_row")} if by == "fallback" else {"layer_config": rules}
    _, quality = run(source, tmp_path / "out", TransformersLayout("none"), format="int8_row", **extra)
    formats = {(".experts." in key, found.format) for key, found in quality.items()}
    assert formats == {(True, "float8_e4m3fn row"), (False, "int8 row")}
    assert sqnr(logits(source), logits(tmp_path / "out")) > 30


def test_a_rule_that_names_experts_is_followed_with_a_warning(tmp_path: Path) -> None:
    source = mixture("mixtral", tmp_path / "in")
    custom = LayerOverride("experts", storage_format("int8_row"))
    conversion, quality = run(source, tmp_path / "out", TransformersLayout(), custom_layers=custom)
    assert len(quality) == 32
    assert any("24 weights cannot be loaded" in warning for warning in conversion.plan.warnings)


def test_blocks_that_cut_activation_groups_stay(llama: Path, tmp_path: Path) -> None:
    """64 inputs are two groups of 32, 160 are five; neither is whole groups of 48."""
    _, quality = run(llama, tmp_path / "a", TransformersLayout(), format="fp8_e4m3_block", block_size=32)
    assert len(quality) == 14
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
        assert model(torch.arange(1, 9)[None]).logits.isfinite().all()
    with pytest.raises(ValueError, match="activation groups of 48"):
        run(llama, tmp_path / "b", TransformersLayout(), format="fp8_e4m3_block", block_size=48)
    _, quality = run(
        llama, tmp_path / "c", TransformersLayout("none"), format="fp8_e4m3_block", block_size=48
    )
    assert len(quality) == 14


def test_fused_experts_and_routers_stay(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        hidden_size=48, intermediate_size=64, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=100, head_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    from safetensors.torch import save_file

    (tmp_path / "in").mkdir()
    save_file(state, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(tmp_path / "in")
    conversion, quality = run(tmp_path / "in", tmp_path / "out", TransformersLayout(), format="fp8_e4m3_row")
    reasons = {each.name: each.reason for each in conversion.plan.tensors}
    fused = [name for name, value in state.items() if value.ndim == 3]
    assert fused
    assert all("expert" in reasons[name] for name in fused)
    assert not any(".gate.weight" in name for name in quality)
    assert any("q_proj" in name for name in quality)
    assert sqnr(logits(tmp_path / "in"), logits(tmp_path / "out")) > 20


@pytest.mark.skipif(not STORIES.exists(), reason="stories15M is not here")
@pytest.mark.parametrize("name", ["int8_row", "fp8_e4m3_row"])
def test_a_trained_model_writes_the_same_story(tmp_path: Path, name: str) -> None:
    run(STORIES, tmp_path / "out", TransformersLayout(), format=name)
    prompt = torch.tensor([[1, 9038, 2501, 263, 931]])
    stories = []
    for folder in (STORIES, tmp_path / "out"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        stories.append(model.generate(prompt, max_new_tokens=20, do_sample=False).tolist())
    assert stories[0] == stories[1]
