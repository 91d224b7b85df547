"""Every parameter of ``convert_to_int8``: its default, and that another value changes what it should or is refused."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import qwodel.checkpoint.run.carry_out as convert_module
from qwodel.checkpoint.run.executor import SerialExecutor
from qwodel.devices import STREAMING_MODES, StreamingOptions, StreamingThresholds
from qwodel.exceptions import ConfigurationError, ValidationError
from qwodel.int8 import Int8Conversion, convert_to_int8, plan_int8
from tests.checkpoint.checkpoints import LLAMA_LAYER, random_weights

REQUIRED = inspect.Parameter.empty
SIGNATURE: dict[str, Any] = {
    "input_file": REQUIRED, "output_file": REQUIRED, "comfy_quant": REQUIRED, "filter_flags": REQUIRED,
    "calib_samples": REQUIRED, "seed": REQUIRED, "fp16": False, "fallback": None, "custom_layers": None,
    "exclude_layers": None, "custom_type": None, "custom_block_size": None, "custom_scaling_mode": None,
    "custom_simple": False, "custom_heur": False, "fallback_block_size": None, "fallback_simple": False,
    "full_precision_matrix_mult": False, "skip_inefficient_layers": False, "include_input_scale": False,
    "no_learned_rounding": False, "save_quant_metadata": False, "layer_config": None,
    "layer_config_fullmatch": False, "low_memory": False, "streaming_mode": "balanced",
    "streaming_thresholds": None, "no_memory_limits": False, "report_quality": False,
    "quality_threshold": 30.0, "smoothquant": False, "smoothquant_alpha": 0.5, "calibration_data_path": None,
    "calibration_lora_path": None, "gptq_actorder": False, "gptq_fast": True, "gptq_turbo": False,
    "quip_actorder": True, "quip_hadamard": True, "quip_seed": None, "quip_store_transformed": False,
    "quip_requant_scheme": "tensor", "quip_requant_tensor_per_row": True, "quip_checkpointed": False,
    "quip_checkpoint_threshold": 8192, "quip_checkpoint_segments": 4, "merge_lora_path": None,
    "merge_lora_paths": None, "merge_lora_scale": 1.0, "merge_lora_dampen": True, "converter_kwargs": REQUIRED,
}  # fmt: skip
"""The documented parameters and their defaults, written down apart from the code."""

DOWN, GATE, Q = (f"model.layers.0.{name}" for name in ("mlp.down_proj", "mlp.gate_proj", "self_attn.q_proj"))
EVEN = "blocks.0.even"
SHAPES: dict[str, tuple[int, ...]] = {
    **{f"model.layers.0.{name}": shape for name, shape in LLAMA_LAYER.items()},
    f"{EVEN}.weight": (128, 256),
    "lm_head.weight": (100, 48),
}
FAST = {"num_iter": 5, "max_k": 4, "min_k": 1, "top_p": 0.01}
UPDATES = random_weights(
    {"a.lora_A.weight": (2, 96), "a.lora_B.weight": (48, 2), "b.lora_A.weight": (3, 96), "b.lora_B.weight": (48, 3)},
    torch.float32,
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """A finished conversion."""

    result: Int8Conversion
    out: Mapping[str, torch.Tensor]
    header: Mapping[str, str]
    log: str
    executor: tuple[torch.device, int, StreamingOptions]

    def rounding(self, layer: str) -> str:
        return {each.name: each.rounding for each in self.result.quality}[f"{layer}.weight"]

    def decoded(self, layer: str) -> torch.Tensor:
        return self.out[f"{layer}.weight"].float() * self.out[f"{layer}.weight_scale"]


Check = Callable[[Outcome, Outcome], bool]


@dataclass(frozen=True)
class Case:
    """One parameter at another value; ``expect`` compares with the plain run, or is the refusal's text."""

    parameter: str
    options: Mapping[str, Any]
    expect: Check | str
    base: Mapping[str, Any] = field(default_factory=lambda: {"no_learned_rounding": True})


def is_dtype(layer: str, dtype: torch.dtype) -> Check:
    return lambda _, after: after.out[f"{layer}.weight"].dtype == dtype


def scale_shape(layer: str, *shape: int) -> Check:
    return lambda _, after: tuple(after.out[f"{layer}.weight_scale"].shape) == shape


def merged(*terms: tuple[str, float]) -> Check:
    """The layer decodes to its weight plus the LoRAs, each with its factor."""

    def check(before: Outcome, after: Outcome) -> bool:
        wanted = random_weights(SHAPES)[f"{DOWN}.weight"].float()
        for name, factor in terms:
            wanted = wanted + factor * UPDATES[f"{name}.lora_B.weight"] @ UPDATES[f"{name}.lora_A.weight"]
        step = after.out[f"{DOWN}.weight_scale"]
        return bool(((after.decoded(DOWN) - wanted).abs() <= 0.5001 * step).all())

    return check


def same_bytes(before: Outcome, after: Outcome) -> bool:
    return before.out.keys() == after.out.keys() and all(
        torch.equal(before.out[name], after.out[name]) for name in before.out
    )


VISUAL = {"no_learned_rounding": True, "filter_flags": {"visual": True}}
LEARNED: dict[str, Any] = dict(FAST)
SIMPLE = {"no_learned_rounding": True}
CASES = [
    Case("input_file", {"input_file": "shards"}, same_bytes),
    Case("output_file", {"output_file": "other.safetensors"}, lambda _, b: b.result.path.name == "other.safetensors"),
    Case("comfy_quant", {"comfy_quant": False}, lambda _, b: f"{DOWN}.scale_weight" in b.out and "scaled_fp8" in b.out),
    Case("filter_flags", {"filter_flags": {"visual": True}}, is_dtype(DOWN, torch.bfloat16)),
    Case("filter_flags", {"filter_flags": {"t5": True}}, "t5"),
    Case("seed", {"seed": 7}, lambda a, b: not same_bytes(a, b), LEARNED),
    Case("fp16", {"fp16": True}, is_dtype("lm_head", torch.float16)),
    Case("fallback", {"fallback": "fp16"}, is_dtype(DOWN, torch.float16), VISUAL),
    Case("fallback", {"fallback": "int4"}, "int4", VISUAL),
    Case("custom_layers", {"custom_layers": "lm_head"}, is_dtype("lm_head", torch.int8)),
    Case("custom_layers", {"custom_layers": "("}, "regular expression"),
    Case("exclude_layers", {"exclude_layers": "down_proj"}, is_dtype(DOWN, torch.bfloat16)),
    Case("custom_type", {"custom_layers": "down_proj", "custom_type": "fp16"}, is_dtype(DOWN, torch.float16)),
    Case("custom_type", {"custom_type": "fp16"}, "custom_layers"),
    Case("custom_block_size", {"custom_layers": "down_proj", "custom_block_size": 16}, scale_shape(DOWN, 3, 6)),
    Case("custom_block_size", {"custom_block_size": 16}, "custom_layers"),
    Case("custom_scaling_mode", {"custom_layers": "down_proj", "custom_scaling_mode": "tensor"}, scale_shape(DOWN)),
    Case("custom_scaling_mode", {"custom_layers": "x", "custom_scaling_mode": "axis"}, "scaling mode"),
    Case(
        "custom_simple", {"custom_layers": "down_proj", "custom_simple": True},
        lambda _, b: (b.rounding(DOWN), b.rounding(Q)) == ("nearest", "learned"), LEARNED,
    ),
    Case("custom_simple", {"custom_simple": True}, "custom_layers"),
    Case(
        "custom_heur", {"custom_layers": "down_proj|even", "custom_scaling_mode": "tensor", "custom_heur": True},
        lambda a, b: scale_shape(EVEN)(a, b) and scale_shape(DOWN, 48, 1)(a, b),
    ),
    Case("custom_heur", {"custom_heur": True}, "custom_layers"),
    Case("fallback_block_size", {"fallback": "int8", "fallback_block_size": 16}, scale_shape(DOWN, 3, 6), VISUAL),
    Case("fallback_block_size", {"fallback_block_size": 16}, "fallback"),
    Case(
        "fallback_simple", {"fallback": "int8", "fallback_simple": True},
        lambda _, b: (b.rounding(DOWN), b.rounding(Q)) == ("nearest", "learned"),
        {**LEARNED, "filter_flags": {"visual": True}},
    ),
    Case("fallback_simple", {"fallback_simple": True}, "fallback"),
    Case(
        "full_precision_matrix_mult", {"full_precision_matrix_mult": True},
        lambda _, b: json.loads(bytes(b.out[f"{Q}.comfy_quant"].tolist()))["full_precision_matrix_mult"] is True,
    ),
    Case(
        "skip_inefficient_layers", {"skip_inefficient_layers": True},
        lambda a, b: is_dtype(DOWN, torch.bfloat16)(a, b) and is_dtype(EVEN, torch.int8)(a, b),
    ),
    Case("include_input_scale", {"include_input_scale": True}, "input_scale"),
    Case(
        "include_input_scale", {"include_input_scale": True, "comfy_quant": False},
        lambda _, b: float(b.out[f"{Q}.scale_input"]) == 1.0,
    ),
    Case("no_learned_rounding", {"no_learned_rounding": True}, lambda _, b: b.rounding(Q) == "nearest", {}),
    Case("no_learned_rounding", {"num_iter": 3}, "num_iter"),
    Case(
        "save_quant_metadata", {"save_quant_metadata": True},
        lambda a, b: f"{Q}" in json.loads(b.header["_quantization_metadata"])["layers"]
        and "_quantization_metadata" not in a.header,
    ),
    Case(
        "layer_config", {"layer_config": {"layer_patterns": {"down_proj": {"format": "fp16"}}}},
        is_dtype(DOWN, torch.float16),
    ),
    Case("layer_config", {"layer_config": {"layer_patterns": {"x": {"fmt": 1}}}}, "fmt"),
    Case(
        "layer_config_fullmatch",
        {
            "layer_config": {"layer_patterns": {"down_proj": {"skip": True}, ".*gate_proj": {"skip": True}}},
            "layer_config_fullmatch": True,
        },
        lambda a, b: is_dtype(DOWN, torch.int8)(a, b) and is_dtype(GATE, torch.bfloat16)(a, b),
    ),
    Case("layer_config_fullmatch", {"layer_config_fullmatch": True}, "layer_config"),
    Case("low_memory", {"low_memory": True, "device": "auto"}, lambda _, b: b.executor[0].type == "cpu"),
    Case("low_memory", {"low_memory": True, "device": "cuda"}, "low_memory"),
    *(
        Case(
            "streaming_mode", {"streaming_mode": mode},
            lambda a, b, mode=mode: b.executor[2].mode == mode and same_bytes(a, b),
        )
        for mode in STREAMING_MODES
    ),
    Case("streaming_mode", {"streaming_mode": "agressive"}, "no streaming mode"),
    Case(
        "streaming_thresholds", {"streaming_thresholds": {"hadamard": 5, "ldlq": None}},
        lambda _, b: b.executor[2].thresholds_for(None) == StreamingThresholds(5, 24576, None, 12288),
    ),
    Case("streaming_thresholds", {"streaming_thresholds": {"qr": 5}}, "no streaming threshold"),
    Case(
        "no_memory_limits", {"no_memory_limits": True},
        lambda _, b: b.executor[2].thresholds_for(None) == StreamingThresholds(),
    ),
    Case("no_memory_limits", {"no_memory_limits": True, "streaming_thresholds": {"ldlq": 1}}, "no effect"),
    Case("report_quality", {"report_quality": True}, lambda a, b: f"dB  {Q}.weight" in b.log and "dB  " not in a.log),
    Case(
        "quality_threshold", {"quality_threshold": 90.0},
        lambda a, b: len(b.result.below_threshold) == 5 and not a.result.below_threshold,
    ),
    Case("merge_lora_path", {"merge_lora_path": "a"}, merged(("a", 1.0))),
    Case("merge_lora_path", {"merge_lora_path": "a", "merge_lora_paths": ["b"]}, "not both"),
    Case("merge_lora_paths", {"merge_lora_paths": ["a", "b"]}, merged(("a", 1.0), ("b", 0.9))),
    Case("merge_lora_scale", {"merge_lora_path": "a", "merge_lora_scale": 0.5}, merged(("a", 0.5))),
    Case("merge_lora_scale", {"merge_lora_scale": 0.5}, "merge_lora_path"),
    Case(
        "merge_lora_dampen", {"merge_lora_paths": ["a", "b"], "merge_lora_dampen": False},
        merged(("a", 1.0), ("b", 1.0)),
    ),
    Case("merge_lora_dampen", {"merge_lora_dampen": False}, "merge_lora_path"),
    Case("converter_kwargs", {"scaling_mode": "tensor"}, scale_shape(Q)),
    Case("converter_kwargs", {"scaling_mode": "block", "block_size": 16}, scale_shape(Q, 4, 3)),
    Case("converter_kwargs", {"scaling_mode": "axis"}, "scaling mode"),
    Case("converter_kwargs", {"optimizer": "adamw"}, lambda a, b: not same_bytes(a, b), LEARNED),
    Case("converter_kwargs", {"optimizer": "sgd"}, "sgd", LEARNED),
    Case("converter_kwargs", {"num_iter": 0}, lambda a, b: not same_bytes(a, b), LEARNED),
    Case("converter_kwargs", {"workers": 3}, lambda _, b: b.executor[1] == 3),
    Case("converter_kwargs", {"device": "tpu"}, "no device"),
    Case("converter_kwargs", {"nonsense": 1}, "nonsense", LEARNED),
]  # fmt: skip

NEEDS_ACTIVATIONS = [
    Case("calib_samples", {"calib_samples": 64}, same_bytes),
    Case("calib_samples", {"calib_samples": -1}, "calib_samples"),
    Case("smoothquant", {"smoothquant": True}, "smoothquant"),
    Case("smoothquant_alpha", {"smoothquant_alpha": 0.7}, "smoothquant"),
    Case("calibration_data_path", {"calibration_data_path": "x"}, "calibration_data_path"),
    Case("calibration_data_path", {"calibration_data_path": "x", "fp16": True}, "calibration_data_path"),
    Case("calibration_lora_path", {"calibration_lora_path": "x"}, "calibration_lora_path"),
    Case("gptq_actorder", {"gptq_actorder": True}, "gptq_actorder"),
    Case("gptq_fast", {"gptq_fast": False}, "gptq_fast"),
    Case("gptq_turbo", {"gptq_turbo": True}, "gptq_turbo"),
    Case("quip_actorder", {"quip_actorder": False}, "quip_actorder"),
    Case("quip_hadamard", {"quip_hadamard": False}, "quip_hadamard"),
    Case("quip_seed", {"quip_seed": 1}, "quip_seed"),
    Case("quip_store_transformed", {"quip_store_transformed": True}, "quip_store_transformed"),
    Case("quip_requant_scheme", {"quip_requant_scheme": "block"}, "quip_requant_scheme"),
    Case("quip_requant_tensor_per_row", {"quip_requant_tensor_per_row": False}, "quip_requant_tensor_per_row"),
    Case("quip_checkpointed", {"quip_checkpointed": True}, "quip_checkpointed"),
    Case("quip_checkpoint_threshold", {"quip_checkpoint_threshold": 64}, "quip_checkpoint_threshold"),
    Case("quip_checkpoint_segments", {"quip_checkpoint_segments": 2}, "quip_checkpoint_segments"),
    Case("converter_kwargs", {"optimizer": "gptq"}, "gptq", LEARNED),
    Case("converter_kwargs", {"optimizer": "quip"}, "quip", LEARNED),
]  # fmt: skip
"""Parameters that go by activations, where none are given; ``test_columnwise`` gives some."""


@dataclass
class Workbench:
    """A folder with inputs, and runs in it."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    caplog: pytest.LogCaptureFixture

    def convert(self, options: Mapping[str, Any]) -> Outcome:
        given: dict[str, Any] = {
            "input_file": "in.safetensors", "output_file": "out.safetensors", "comfy_quant": True,
            "filter_flags": {}, "calib_samples": 6144, "seed": 42, **options,
        }  # fmt: skip
        for name in ("input_file", "output_file"):
            given[name] = str(self.folder / given[name])
        if "merge_lora_path" in given:
            given["merge_lora_path"] = str(self.folder / f"{given['merge_lora_path']}.safetensors")
        if "merge_lora_paths" in given:
            given["merge_lora_paths"] = [
                str(self.folder / f"{name}.safetensors") for name in given["merge_lora_paths"]
            ]
        asked: list[tuple[torch.device, int, StreamingOptions]] = []

        def executor_for(*arguments: Any) -> SerialExecutor:
            asked.append(arguments)  # type: ignore[arg-type]
            return SerialExecutor()

        self.monkeypatch.setattr(convert_module, "executor_for", executor_for)
        self.monkeypatch.setattr(convert_module, "make_executor", lambda _: SerialExecutor())
        self.caplog.clear()
        with self.caplog.at_level(logging.INFO):
            result = convert_to_int8(**given)
        with safe_open(result.path, "pt") as file:
            out = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            header = file.metadata() or {}
        return Outcome(result, out, header, self.caplog.text, asked[0])


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Workbench:
    for name in ("ENABLE_MIXED_HADAMARD", "MIXED_HADAMARD_DTYPE", "STREAMING_AGGRESSIVENESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # torch's optimizers ask the driver where torch was built with CUDA and says that it is there.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    weights = random_weights(SHAPES)
    save_file(weights, tmp_path / "in.safetensors")
    (tmp_path / "shards").mkdir()
    names = sorted(weights)
    save_file({name: weights[name] for name in names[:3]}, tmp_path / "shards" / "1.safetensors")
    save_file({name: weights[name] for name in names[3:]}, tmp_path / "shards" / "2.safetensors")
    for which in ("a", "b"):
        part = {
            f"{DOWN}.{name[2:]}": tensor for name, tensor in UPDATES.items() if name.startswith(f"{which}.")
        }
        save_file(part, tmp_path / f"{which}.safetensors")
    return Workbench(tmp_path, monkeypatch, caplog)


def test_names_and_defaults_are_the_documented_ones() -> None:
    parameters = inspect.signature(convert_to_int8).parameters
    assert {name: each.default for name, each in parameters.items()} == SIGNATURE
    assert list(parameters) == list(SIGNATURE)


def test_every_parameter_has_a_case() -> None:
    assert {case.parameter for case in CASES + NEEDS_ACTIVATIONS} == set(SIGNATURE)


@pytest.mark.parametrize(
    "case", CASES + NEEDS_ACTIVATIONS, ids=lambda case: f"{case.parameter}-{case.options}"
)
def test_another_value_has_its_effect_or_is_refused(bench: Workbench, case: Case) -> None:
    if isinstance(case.expect, str):
        with pytest.raises(ConfigurationError, match=case.expect):
            bench.convert({**case.base, **case.options})
        assert not (bench.folder / "out.safetensors").exists()
        return
    before = bench.convert(case.base)
    after = bench.convert({**case.base, **case.options})
    assert case.expect(before, after)


def test_the_same_seed_gives_the_same_bytes(bench: Workbench) -> None:
    assert same_bytes(bench.convert(LEARNED), bench.convert(LEARNED))


@pytest.mark.parametrize(
    ("value", "options", "mode"),
    [
        ("conservative", {}, "minimal"), ("balanced", {}, "balanced"), ("aggressive", {}, "aggressive"),
        ("aggressive", {"streaming_mode": "off"}, "off"),
    ],
)  # fmt: skip
def test_streaming_aggressiveness_stands_for_the_default_mode(
    bench: Workbench, value: str, options: dict[str, Any], mode: str
) -> None:
    bench.monkeypatch.setenv("STREAMING_AGGRESSIVENESS", value)
    assert bench.convert({**SIMPLE, **options}).executor[2].mode == mode


@pytest.mark.parametrize(
    ("name", "neutral", "other"),
    [
        ("ENABLE_MIXED_HADAMARD", "auto", "1"),
        ("MIXED_HADAMARD_DTYPE", "bfloat16", "float16"),
        ("STREAMING_AGGRESSIVENESS", "balanced", "wild"),
    ],
)
def test_environment_variables_without_effect_are_refused(
    bench: Workbench, name: str, neutral: str, other: str
) -> None:
    bench.monkeypatch.setenv(name, other)
    with pytest.raises(ConfigurationError, match=f"the environment sets {name}={other}"):
        bench.convert(SIMPLE)
    assert not (bench.folder / "out.safetensors").exists()
    bench.monkeypatch.setenv(name, neutral)
    assert bench.convert(SIMPLE).out


def test_on_the_cpu_streaming_has_nothing_to_do_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(random_weights(SHAPES), tmp_path / "in.safetensors")
    with caplog.at_level(logging.DEBUG, logger="qwodel"):
        convert_to_int8(
            str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), True, {}, 0, 0,
            no_learned_rounding=True, streaming_mode="aggressive",
        )  # fmt: skip
    assert "streaming modes have nothing to move" in caplog.text


def test_the_plan_takes_the_same_arguments_and_knows_the_size(bench: Workbench) -> None:
    source, target = str(bench.folder / "in.safetensors"), str(bench.folder / "out.safetensors")
    plan = plan_int8(source, target, True, {}, 0, 42, exclude_layers="gate", no_learned_rounding=True)
    assert not Path(target).exists()
    assert f"{plan.output_bytes:,} bytes" in plan.table()
    bench.convert({"exclude_layers": "gate", "no_learned_rounding": True})
    assert Path(target).stat().st_size == plan.output_bytes
    with pytest.raises(TypeError, match="calib_samples"):
        plan_int8(source, target, True, {})
    with pytest.raises(ConfigurationError, match="smoothquant"):
        plan_int8(source, target, True, {}, 0, 42, smoothquant=True)
    with pytest.raises(ValidationError, match="input itself"):
        plan_int8(source, source, True, {}, 0, 42)
