from __future__ import annotations

from typing import Any

import pytest

from qwodel.checkpoint.formats.registry import storage_format
from qwodel.checkpoint.plan.decisions import Decider
from qwodel.checkpoint.plan.layer_config import LayerConfig
from qwodel.checkpoint.plan.recipe import LayerOverride, Recipe
from qwodel.checkpoint.rounding.methods import ScaleSearch
from qwodel.checkpoint.source.source_tensor import SourceTensor
from qwodel.checkpoint.tensors import Action
from qwodel.exceptions import ConfigurationError

INT8, FP8, FP16, BLOCK = (storage_format(name) for name in ("int8_row", "fp8_e4m3", "fp16", "int8_block"))


def tensor(
    name: str = "blocks.0.attn.q.weight", shape: tuple[int, ...] = (256, 256), dtype: str = "BF16"
) -> SourceTensor:
    return SourceTensor(name, shape, dtype, (name,))


def decide(source: SourceTensor, filters: tuple[str, ...] = (), **recipe: Any) -> tuple[str, str]:
    decision = Decider(Recipe(**{"format": INT8, **recipe}), filters).decide(source)
    assert decision.reason
    return (str(decision.format) if decision.format else str(decision.action)), decision.reason


@pytest.mark.parametrize(
    ("source", "becomes"),
    [
        (tensor(), "int8_row"),
        (tensor("model.norm.weight", (256,)), "copy"),
        (tensor("embed_tokens.weight"), "copy"),
        (tensor("blocks.0.attn.q.bias", (256,)), "copy"),
        (tensor("conv.weight", (8, 8, 3, 3)), "copy"),
        (tensor("experts.gate_up_proj", (4, 8, 8)), "copy"),
        (tensor("a.weight", (0, 8)), "copy"),
        (tensor("a.weight", dtype="I8"), "copy"),
        (tensor("scale_shift_table", (6, 64)), "copy"),
    ],
)
def test_without_options_only_plain_matrices_are_quantized(source: SourceTensor, becomes: str) -> None:
    assert decide(source)[0] == becomes


def test_exclude_layers_wins_over_everything_named() -> None:
    custom = LayerOverride("attn", FP8)
    assert decide(tensor(), exclude_layers=r"attn\.q", custom_layers=custom)[0] == "copy"


def test_custom_layers_win_over_filters() -> None:
    final = tensor("final_layer.linear.weight")
    assert decide(final, ("flux2",))[0] == "copy"
    assert decide(final, ("flux2",), custom_layers=LayerOverride("final_layer", FP8))[0] == "fp8_e4m3"


def test_custom_layers_with_a_heuristic_leave_awkward_shapes_to_the_rest() -> None:
    custom = LayerOverride("attn", BLOCK, skip_inefficient=True)
    assert decide(tensor(shape=(100, 256)), custom_layers=custom)[0] == "int8_row"
    assert decide(tensor(), custom_layers=custom)[0] == "int8_block"


def test_layer_config_wins_over_custom_layers() -> None:
    rules = LayerConfig.from_mapping({"layer_patterns": {"attn": {"skip": True}}})
    assert decide(tensor(), layer_config=rules, custom_layers=LayerOverride("attn", FP8))[0] == "copy"


def test_layer_config_formats_and_blocks() -> None:
    rules = LayerConfig.from_mapping(
        {"layer_patterns": {"attn": {"format": "int8", "block_size": 64}, "norm": {"format": "fp16"}}}
    )
    decision = Decider(Recipe(format=FP8, layer_config=rules), ()).decide(tensor())
    assert decision.format is not None
    assert (decision.format.name, decision.format.granularity.block_cols) == ("int8_block", 64)
    assert decide(tensor("norm.weight", (8,)), layer_config=rules)[0] == "fp16"
    assert decide(tensor("blocks.0.attn.q.bias", (8,)), layer_config=rules)[0] == "copy"


def test_fallback_takes_what_family_filters_keep_but_not_embeddings() -> None:
    final, embed = tensor("final_layer.linear.weight"), tensor("embed_tokens.weight")
    assert decide(final, ("flux2",), fallback=FP8)[0] == "fp8_e4m3"
    assert decide(embed, ("flux2",), fallback=FP8)[0] == "copy"
    assert decide(embed, ("flux2",), fallback=FP16)[0] == "fp16"


def test_fallback_takes_inefficient_shapes() -> None:
    odd = tensor(shape=(200, 256))
    assert decide(odd, format=BLOCK)[0] == "int8_block"
    what, reason = decide(odd, format=BLOCK, skip_inefficient_layers=True)
    assert what == "copy"
    assert "multiple of 128" in reason
    assert decide(odd, format=BLOCK, skip_inefficient_layers=True, fallback=INT8)[0] == "int8_row"
    assert "below 128" in decide(tensor(shape=(64, 256)), skip_inefficient_layers=True)[1]


def test_removed_layers_are_dropped_with_a_reason() -> None:
    decision = Decider(Recipe(format=INT8), ("t5xxl",)).decide(tensor("decoder.block.0.q.weight"))
    assert decision.action is Action.DROP
    assert "t5xxl" in decision.reason


def test_rounding_travels_with_the_decision() -> None:
    recipe = Recipe(format=INT8, rounding=ScaleSearch())
    assert Decider(recipe, ()).decide(tensor()).rounding == ScaleSearch()


@pytest.mark.parametrize(
    "options",
    [{"exclude_layers": "("}, {"nonfinite": "zero"}, {"max_shard_size": 0}, {"filters": ("flx",)},
     {"custom_layers": LayerOverride("[", FP8)}],
)  # fmt: skip
def test_bad_options_are_configuration_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Recipe(format=INT8, **options)


def test_block_size_needs_blocks() -> None:
    with pytest.raises(ConfigurationError, match="no blocks"):
        storage_format("int8_row", 64)
    with pytest.raises(ConfigurationError):
        storage_format("int5_row")
