"""The adapter's parts: targets, group sizes, mappings, sizes, the bars, and the ways around defects."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from qwodel.backends.awq import launch, sizes, upstream
from qwodel.backends.awq.adapter import AWQQuantizer
from qwodel.backends.awq.bridge import CalibrationProgress, bridged
from qwodel.backends.awq.options import AWQOptions
from qwodel.backends.awq.recipe import choose_group_size, choose_symmetry, is_ignored, mappings, targets
from qwodel.exceptions import ConfigurationError, ValidationError
from qwodel.hardware import GPU, CalibrationSizes
from qwodel.source import inspect_source
from tests.backends.awq.models import SETTINGS, tiny_model

GiB = 1 << 30


def _model(kind: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**{**SETTINGS[kind], **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize(
    ("columns", "wanted", "expected"),
    [
        ((512, 1024), "auto", 128),
        ((576, 1536), "auto", 64),
        ((288, 768), "auto", 32),
        ((48, 96), "auto", 16),
        ((288, 768), 96, 96),
        ((50,), -1, -1),
    ],
)
def test_group_sizes_divide_every_targets_columns(
    columns: tuple[int, ...], wanted: Any, expected: int
) -> None:
    layers = {f"layer{n}": width for n, width in enumerate(columns)}
    assert choose_group_size(layers, wanted) == expected


def test_group_sizes_that_divide_nothing_name_the_layers(caplog: pytest.LogCaptureFixture) -> None:
    layers = {"odd": 50, "even": 64}
    with pytest.raises(ConfigurationError, match="no group size divides the columns of odd") as caught:
        choose_group_size(layers, "auto")
    assert "group_size=-1" in str(caught.value.hint)
    with pytest.raises(ConfigurationError, match=r"100 does not divide the columns \(288\) of a"):
        choose_group_size({"a": 288}, 100)
    with caplog.at_level(logging.INFO, "AWQQuantizer"):
        choose_group_size({"a": 288}, "auto")
        choose_group_size({"a": 288}, 96)
    assert "group_size 32, the largest that divides" in caplog.text
    assert "vLLM's kernels take 128, 64, 32" in caplog.text


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("lm_head", True),
        ("model.layers.0.mlp.gate", True),
        ("model.layers.0.block_sparse_moe.router", True),
        ("model.layers.0.mlp.shared_expert_gate", True),
        ("model.vision_tower.blocks.0.attn.qkv", True),
        ("visual.blocks.3.mlp.fc1", True),
        ("model.multi_modal_projector.linear_1", True),
        ("mtp.layers.0.mlp.up_proj", True),
        ("model.layers.0.mlp.gate_proj", False),
        ("model.layers.0.self_attn.q_proj", False),
        ("model.layers.0.mlp.experts.3.up_proj", False),
    ],
)
def test_default_ignores(name: str, ignored: bool) -> None:
    from qwodel.backends.awq.recipe import _DEFAULT_IGNORE

    assert is_ignored(name, _DEFAULT_IGNORE) is ignored


def test_ignored_modules_are_names_or_whole_expressions(caplog: pytest.LogCaptureFixture) -> None:
    assert is_ignored("a.q_proj", ["re:.*q_proj"])
    assert not is_ignored("a.q_proj_extra", ["re:.*q_proj"])
    assert not is_ignored("a.q_proj", ["q_proj"])
    model = _model("Llama")
    with caplog.at_level(logging.WARNING, "AWQQuantizer"):
        found = targets(model, AWQOptions(ignore=("re:.*vision_tower.*", "re:.*v_proj")))
    assert "no module of the model matches 're:.*vision_tower.*'" in caplog.text
    assert len(found) == 12
    assert not any("v_proj" in name or name == "lm_head" for name in found)


def test_a_head_that_shares_the_embedding_is_never_a_target() -> None:
    model = _model("Llama", tie_word_embeddings=True)
    with pytest.raises(ConfigurationError, match="lm_head shares its weight"):
        targets(model, AWQOptions(default_ignore=False))
    untied = targets(_model("Llama"), AWQOptions(default_ignore=False))
    assert "lm_head" in untied


def test_mappings_come_from_the_wiring_where_llm_compressor_has_none() -> None:
    llama = _model("Llama")
    known = mappings(llama, set(targets(llama, AWQOptions(ignore=("re:.*down_proj",)))))
    assert "model.layers.1.input_layernorm" in {each.smooth_layer for each in known}
    assert not any("down_proj" in name for each in known for name in each.balance_layers)
    model = _model("OPT")
    names = set(targets(model, AWQOptions()))
    found = mappings(model, names)
    first = found[0]
    assert first.smooth_layer == "model.decoder.layers.0.self_attn_layer_norm"
    assert {name.rpartition(".")[2] for name in first.balance_layers} == {"q_proj", "k_proj", "v_proj"}
    assert any(each.smooth_layer.endswith("fc1") and each.balance_layers[0].endswith("fc2") for each in found)


def test_a_norm_llm_compressor_cannot_scale_is_named() -> None:
    model = _model("StableLm")
    with pytest.raises(
        ValidationError, match=r"AWQ cannot move scales from model\.layers\.0\.input_layernorm"
    ):
        mappings(model, set())  # nothing of it is a target


def test_zero_points_follow_the_evidence_and_the_readers() -> None:
    model = _model("Llama")
    assert choose_symmetry(model, AWQOptions()) is False
    assert choose_symmetry(model, AWQOptions(symmetric=True)) is True
    from llmcompressor.modeling.moe.linearize import linearize_moe

    experts = linearize_moe(_model("Qwen3Moe"))
    assert choose_symmetry(experts, AWQOptions()) is True
    with pytest.raises(ConfigurationError, match="zero points, which transformers cannot read"):
        choose_symmetry(experts, AWQOptions(symmetric=False))


def test_explicit_sizes_win_and_quantize_wins_over_the_constructor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = inspect_source(tiny_model("Llama", tmp_path, max_position_embeddings=100_000))
    gpus = [GPU("simulated", 24 * GiB, 10 * GiB), GPU("simulated", 80 * GiB, 70 * GiB)]
    monkeypatch.setattr("qwodel.hardware.list_gpus", lambda: gpus)
    measured: list[int] = []

    def peak(_: Any, batch: int, seq_length: int) -> int:
        measured.append(batch)
        return 3 * GiB * batch

    monkeypatch.setattr(sizes, "list_gpus", lambda: gpus)
    monkeypatch.setattr(sizes, "measured_peak", peak)
    automatic = sizes.starting_sizes(source, AWQOptions())
    # 10 GiB of headroom on the tighter GPU: the row 8–16, with two of its four sequences by measure.
    assert automatic.sizes == CalibrationSizes(2, 4096, 128)
    assert measured == [1, 2]
    built = AWQQuantizer.parse_options({"seq_length": 512, "num_samples": 16, "batch_size": 3})
    assert sizes.starting_sizes(source, built).sizes == CalibrationSizes(3, 512, 16)
    run = AWQQuantizer.parse_options({"seq_len": 256, "num_samples": 8}, built)
    assert sizes.starting_sizes(source, run).sizes == CalibrationSizes(3, 256, 8)
    assert measured == [1, 2]
    with pytest.raises(ConfigurationError, match="same option"):
        AWQQuantizer.parse_options({"seq_len": 256, "seq_length": 256})
    monkeypatch.setattr("qwodel.hardware.list_gpus", list)
    monkeypatch.setattr("qwodel.hardware.available_memory", lambda: 5 * GiB)
    monkeypatch.setattr(sizes, "list_gpus", list)
    assert sizes.starting_sizes(source, AWQOptions()).sizes == CalibrationSizes(2, 4096, 64)


def test_a_measured_pass_grows_with_the_batch(tmp_path: Path) -> None:
    source = inspect_source(tiny_model("Llama", tmp_path))
    one, two, four = (sizes.measured_peak(source, batch, 32, "cpu") for batch in (1, 2, 4))
    hidden = 32 * 64 * 4  # bytes of one sequence's hidden states
    assert one > 3 * hidden
    assert 1.6 < two / one <= 2.1
    assert 1.6 < four / two <= 2.1


def test_bars_become_one_rising_fraction() -> None:
    told: list[tuple[float, str]] = []
    progress = CalibrationProgress(lambda done, total, message: told.append((done / total, message)), 2)
    for block in (1, 2):
        for done in (0, 1, 2):
            progress.bar(f"({block}/2): Calibrating", done, 2)
        for search in ("a", "b"):
            for done in (0, 5, 10):
                progress.bar(f"Grid search for {search}", done, 10)
        for done in (0, 2):
            progress.bar(f"({block}/2): Propagating", done, 2)
    values = [value for value, _ in told]
    assert values == sorted(values)
    assert values[-1] == 1.0
    assert any(0.2 < value < 0.3 for value in values)
    assert "block 1 of 2: searching scales" in {message for _, message in told}


def test_the_toolchains_bars_and_logs_are_ours_only_inside(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    import tqdm
    from llmcompressor.pipelines.sequential import pipeline
    from llmcompressor.utils.dev import get_main_device

    told: list[str] = []
    listener = CalibrationProgress(lambda _done, _total, message: told.append(message), 4)
    with caplog.at_level(logging.DEBUG, "AWQQuantizer"), bridged(listener):
        assert list(pipeline.tqdm(range(3), desc="(1/4): Calibrating")) == [0, 1, 2]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.accelerator, "is_available", lambda: False)
            get_main_device()
        from llmcompressor.core import active_session
        from loguru import logger

        active_session()
        logger.patch(lambda record: record.update(name="llmcompressor.test")).warning("from inside")
        logger.warning("from elsewhere")
    assert pipeline.tqdm is tqdm.tqdm
    assert told[-1] == "block 1 of 4: calibrating"
    assert "from inside" in caplog.text
    assert "from elsewhere" not in caplog.text
    assert not any("No accelerator" in r.message for r in caplog.records if r.levelno >= logging.WARNING)
    assert "Calibrating" not in capfd.readouterr().err


def test_the_pinning_patch_goes_away_when_upstream_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcompressor.pipelines.cache import IntermediatesCache

    def mended(self: Any, batch_index: int, input_names: Any = None) -> None:
        return

    monkeypatch.setattr(IntermediatesCache, "pin_memory", mended)
    with upstream.without_accelerator():
        assert IntermediatesCache.pin_memory is mended

    def broken(self: Any, batch_index: int, input_names: Any = None) -> None:
        raise RuntimeError("Cannot access accelerator device when none is available.")

    monkeypatch.setattr(IntermediatesCache, "pin_memory", broken)
    with upstream.without_accelerator():
        IntermediatesCache([{}], None).pin_memory(0)
    assert IntermediatesCache.pin_memory is broken


def test_offset_norms_are_those_llm_compressor_converts() -> None:
    model = _model("Gemma")
    found = mappings(model, set(targets(model, AWQOptions())))
    assert "model.layers.0.post_attention_layernorm" in {each.smooth_layer for each in found}
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


def test_ranks_are_started_without_the_present_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun starts the ranks with its own environment and with ``python -m``."""
    seen: dict[str, Any] = {}

    def started(command: list[str], **how: Any) -> Any:
        seen.update(command=command, environment=how["env"])
        raise RuntimeError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", str(tmp_path), *sys.path])
    monkeypatch.setattr("qwodel.backends.awq.launch.subprocess.Popen", started)
    with pytest.raises(RuntimeError, match="enough"):
        launch._supervise(2, tmp_path, lambda *_: None)
    assert seen["command"][1:4] == ["-P", "-m", "torch.distributed.run"]
    assert seen["environment"]["PYTHONSAFEPATH"] == "1"
    assert str(tmp_path) not in seen["environment"]["PYTHONPATH"].split(os.pathsep)
