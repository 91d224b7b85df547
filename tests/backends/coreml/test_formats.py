from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from qwodel import Quantizer
from qwodel.backends.coreml.dimensions import check_options, text_dimensions
from qwodel.backends.coreml.formats import resolve
from qwodel.backends.coreml.models import ModelKind, classify
from qwodel.backends.coreml.options import CoreMLOptions
from qwodel.exceptions import ConfigurationError, ValidationError
from qwodel.model_config import context_length


def test_the_formats_of_the_specification_are_there() -> None:
    assert list(Quantizer.list_formats("coreml")) == [
        "float16",
        "int8_linear",
        "int8_symmetric",
        "int4",
        "int6",
    ]


@pytest.mark.parametrize(
    ("name", "options", "target", "granularity", "group"),
    [
        ("float16", {}, "iOS15", None, 0),
        ("int8_linear", {}, "iOS16", "per_channel", 0),
        ("int8_symmetric", {"granularity": "per_tensor"}, "iOS16", "per_tensor", 0),
        ("int8_symmetric", {"group_size": 64}, "iOS18", "per_block", 64),
        ("int6", {}, "iOS16", "per_tensor", 0),
        ("int6", {"group_size": 16}, "iOS18", "per_grouped_channel", 16),
        ("int4", {}, "iOS18", "per_grouped_channel", 32),
        ("float16", {"stateful": True}, "iOS18", None, 0),
        ("float16", {"shapes": "enumerated"}, "iOS18", None, 0),
        ("int8_linear", {"deployment_target": "macOS14"}, "macOS14", "per_channel", 0),
        ("int4", {"deployment_target": "macOS15"}, "macOS15", "per_grouped_channel", 32),
    ],
)
def test_the_target_follows_from_what_is_asked(
    name: str, options: dict[str, Any], target: str, granularity: str | None, group: int
) -> None:
    recipe = resolve(name, CoreMLOptions(**options))
    assert (recipe.target, recipe.granularity, recipe.group_size) == (target, granularity, group)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("int4", {"deployment_target": "iOS17"}, "iOS17 is too old: int4 needs iOS18"),
        ("int4", {"deployment_target": "macOS14"}, r"macOS14 is too old: int4 needs iOS18 \(macOS15\)"),
        ("int8_linear", {"deployment_target": "iOS15"}, "int8_linear needs iOS16"),
        ("int6", {"group_size": 8, "deployment_target": "iOS16"}, "int6 in groups needs iOS18"),
        (
            "float16",
            {"stateful": True, "deployment_target": "iOS17"},
            "a stateful key-value cache needs iOS18",
        ),
        ("float16", {"granularity": "per_tensor"}, "float16 has no granularity"),
        ("int4", {"granularity": "per_block"}, "int4 has no granularity 'per_block'"),
        ("int8_linear", {"mode": "kmeans"}, "int8_linear has no mode 'kmeans'"),
        ("int8_linear", {"mode": "linear_symmetric"}, "int8_linear has no mode"),
        ("int8_linear", {"granularity": "per_channel", "group_size": 8}, "group_size belongs to groups"),
        ("float16", {"group_size": 8}, "group_size belongs to groups"),
    ],
)
def test_what_does_not_go_together_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resolve(name, CoreMLOptions(**options))


@pytest.mark.parametrize(
    ("options", "dimensions"),
    [
        ({}, (1, 256, 256, (), False)),
        ({"seq_length": 64}, (1, 64, 64, (), False)),
        ({"input_shape": (2, 16), "seq_length": 64}, (2, 16, 64, (), False)),
        ({"shapes": "fixed", "input_shape": (1, 40)}, (1, 40, 40, (), True)),
        ({"shapes": "enumerated", "seq_length": 100}, (1, 100, 100, (16, 32, 64, 100), False)),
        ({"shapes": "enumerated", "lengths": (32, 8)}, (1, 32, 32, (8, 32), False)),
    ],
)
def test_sizes_are_cut_to_the_context(options: dict[str, Any], dimensions: tuple[Any, ...]) -> None:
    found = text_dimensions({"max_position_embeddings": 256}, CoreMLOptions(**options))
    assert (found.batch, found.traced, found.longest, found.lengths, found.fixed) == dimensions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (1, 3, 8, 8)}, r"is not \(batch, tokens\)"),
        ({"seq_length": 257}, "more than the model's context of 256"),
        ({"input_shape": (1, 100), "seq_length": 64}, "asks for 100 tokens, and the model takes 64"),
        ({"shapes": "enumerated", "lengths": (16, 300)}, "lengths has 300 tokens"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        text_dimensions({"max_position_embeddings": 256}, CoreMLOptions(**options))


def test_roberta_keeps_positions_for_padding() -> None:
    assert context_length({"model_type": "roberta", "max_position_embeddings": 514}) == 512
    assert context_length({"model_type": "gpt2", "n_positions": 1024}) == 1024
    assert context_length({}) is None


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ModelKind.ENCODER, {"stateful": True}, "stateful means nothing to an encoder"),
        (ModelKind.DECODER, {"token_type_ids": True}, "token_type_ids means nothing"),
        (ModelKind.VISION, {"seq_length": 8, "shapes": "fixed"}, "seq_length, shapes mean nothing"),
        (ModelKind.DECODER, {"example_inputs": "x.pt"}, "example_inputs means nothing"),
        (ModelKind.DECODER, {"stateful": True, "shapes": "fixed"}, "takes any number of tokens"),
    ],
)
def test_options_of_another_kind_of_model_are_refused(
    kind: ModelKind, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_options(kind, CoreMLOptions(**options))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ModelKind.DECODER),
        ({"architectures": ["Qwen3ForCausalLM"]}, ModelKind.DECODER),
        ({"architectures": ["BertModel"], "model_type": "bert"}, ModelKind.ENCODER),
        ({"architectures": ["AlbertForMaskedLM"]}, ModelKind.ENCODER),
        ({"architectures": ["ViTModel"], "model_type": "vit"}, ModelKind.VISION),
        ({"architectures": ["ConvNextForImageClassification"]}, ModelKind.VISION),
    ],
)
def test_kinds_of_models(config: dict[str, Any], kind: ModelKind) -> None:
    assert classify(config) is kind


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "names no architecture"),
        (
            {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "an encoder with a decoder",
        ),
        ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 64}, "routes tokens to experts"),
        ({"architectures": ["MambaForCausalLM"], "state_size": 16}, "state-space"),
        ({"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}, "several modalities"),
        ({"architectures": ["LlamaForCausalLM"], "quantization_config": {"bits": 4}}, "quantized already"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "language-model head"),
        ({"architectures": ["Wav2Vec2ForCTC"]}, "inputs and outputs are not known"),
    ],
)
def test_models_that_cannot_be_taken_say_why(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        classify(config)


def test_options_are_validated_through_the_facade(tmp_path: Any) -> None:
    for given, message in (
        ({"compute_units": "GPU"}, "compute_units"),
        ({"input_shape": (0, 4)}, "every size must be at least 1"),
        ({"lengths": (4,)}, "lengths belong to shapes='enumerated'"),
        ({"deployment_target": "iOS14"}, "deployment_target"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Quantizer("coreml", tmp_path, **given)


def test_listing_formats_and_options_imports_no_framework() -> None:
    program = (
        "import sys; from qwodel import Quantizer; from qwodel.backends import load_backend\n"
        "Quantizer.list_formats('coreml'); load_backend('coreml').parse_options({'seq_length': 8})\n"
        "print({'torch', 'transformers', 'coremltools'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
