"""Trained models through the facade: sizes, contents, and outputs of the written programs."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
import transformers
from coremltools.optimize.coreml import decompress_weights

from qwodel.backends.coreml import compress as module
from qwodel.backends.coreml.checks import decode
from qwodel.backends.coreml.mil.evaluate import Evaluator
from tests.backends.coreml.runs import Made, make

FORMATS = ("float16", "int8_linear", "int8_symmetric", "int4", "int6")
RATIOS = {"float16": 2, "int8_linear": 4, "int8_symmetric": 4, "int4": 8, "int6": 5}


@pytest.fixture(scope="session")
def short(short_stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """One layer of stories15M in all formats; the benchmark does the whole model in all."""
    out = tmp_path_factory.mktemp("short")
    return {name: make(short_stories, out, name) for name in FORMATS}


@pytest.fixture(scope="session")
def whole(stories15m: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The whole of stories15M in float16."""
    return make(stories15m, tmp_path_factory.mktemp("stories"), "float16")


def text_of(model_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Text the model writes, and its logits there in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    ids = model.generate(torch.tensor([[1]]), max_new_tokens=120, do_sample=False)
    with torch.no_grad():
        return ids, model(ids).logits[0].double()


def logits_of(made: Made, ids: torch.Tensor) -> torch.Tensor:
    return made.run(input_ids=ids.int(), attention_mask=torch.ones_like(ids).int())["logits"][0]


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean KL(reference ‖ logits) over positions, in nats."""
    target = reference.log_softmax(-1)
    return float((target.exp() * (target - logits.double().log_softmax(-1))).sum(-1).mean())


@pytest.mark.slow
def test_sizes_are_those_of_the_formats(short: dict[str, Made]) -> None:
    parameters = 4000 * 288 + 4 * 288 * 288 + 3 * 768 * 288 + 3 * 288
    for name, made in short.items():
        stored = sum(file.stat().st_size for file in made.package.rglob("*") if file.is_file())
        ratio = parameters * 4 / stored
        assert made.info["parameters"] == parameters
        assert made.info["compression_ratio"] == pytest.approx(ratio, rel=0.01)
        # In a model of 2 M parameters, tables and descriptions count.
        assert ratio == pytest.approx(RATIOS[name], rel=0.16), name
        bits = {"int4": 4, "int6": 6}.get(name, 32 / RATIOS[name])
        assert made.info["bits_per_weight"] == pytest.approx(bits, rel=0.12)


@pytest.mark.slow
def test_the_whole_model_gives_the_logits_of_torch(stories15m: Path, whole: Made) -> None:
    ids, reference = text_of(stories15m)
    logits = logits_of(whole, ids)
    assert float((logits - reference).norm() / reference.norm()) <= 1e-2
    assert (logits.argmax(-1) == reference.argmax(-1)).float().mean() > 0.98
    assert divergence(reference, logits) < 1e-4
    assert whole.info["evaluated"]["relative_error"] <= 1e-2
    assert whole.info["compression_ratio"] == pytest.approx(2, rel=0.02)


@pytest.mark.slow
def test_fewer_bits_diverge_more(short_stories: Path, short: dict[str, Made]) -> None:
    ids, reference = text_of(short_stories)
    found = {name: divergence(reference, logits_of(made, ids)) for name, made in short.items()}
    assert found["float16"] < 1e-5
    assert found["float16"] < found["int8_linear"] < 0.01
    assert found["float16"] < found["int8_symmetric"] < 0.01
    assert found["int8_linear"] < found["int6"] < 0.1
    assert found["int6"] < found["int4"] < 0.7


@pytest.mark.slow
def test_the_manifest_names_kinds_and_quality(short: dict[str, Made]) -> None:
    expected = {
        "int8_linear": ("constexpr_affine_dequantize", 34),
        "int8_symmetric": ("constexpr_affine_dequantize", 33),
        "int4": ("constexpr_lut_to_dense", 18),
        "int6": ("constexpr_lut_to_dense", 28),
    }
    for name, (operation, least) in expected.items():
        manifest = json.loads((short[name].folder / "qwodel.manifest.json").read_text())
        assert manifest["compressed"] == {operation: 8}
        assert len(manifest["sqnr_db"]) == 8
        assert min(manifest["sqnr_db"].values()) > least - 0.5
        # RoPE tables and the empty bias of the head are not weights.
        assert {"a table of the model, not a weight", "a vector"} == set(manifest["kept"].values())
        assert manifest["trace_error"] < 1e-5
        assert manifest["source"]["sha256"].keys() == {"model.safetensors"}
    assert short["int4"].info["groups"]["model.embed_tokens.weight"] == 125


@pytest.mark.slow
def test_weights_decode_as_coremltools_decodes_them(short: dict[str, Made]) -> None:
    """decompress_weights is coremltools' own reading of the same bytes."""
    for name in ("int8_linear", "int4", "int6"):
        program = short[name].program
        dense = decompress_weights(ct.models.MLModel(str(short[name].package), skip_model_load=True))
        spec = dense.get_spec().mlProgram.functions["main"]
        block = spec.block_specializations[spec.opset]
        constants = {each.outputs[0].name for each in block.operations if each.type == "const"}
        weights = Path(dense.weights_dir)
        checked = 0
        for operation in program.operations:
            if operation.type.startswith("constexpr_") and "layers_0_self_attn" in operation.name:
                other = _constant(block, operation.name, weights)
                assert np.abs(decode(program, operation).numpy() - other).max() <= 2e-3 * np.abs(other).max()
                checked += 1
        assert checked == 4, constants


def _constant(block: Any, start: str, weights: Path) -> np.ndarray:
    from coremltools.libmilstoragepython import _BlobStorageReader as Reader

    found = next(
        each for each in block.operations
        if each.type == "const" and each.outputs[0].name.startswith(start)
    )  # fmt: skip
    shape = [size.constant.size for size in found.outputs[0].type.tensorType.dimensions]
    bits = Reader(str(weights / "weight.bin")).read_fp16_data(found.attributes["val"].blobFileValue.offset)
    return np.array(bits, np.uint16).view(np.float16).reshape(shape).astype(np.float32)


@pytest.mark.slow
def test_the_package_says_what_it_is(short: dict[str, Made]) -> None:
    made = short["int4"]
    spec = made.program.spec
    facts = spec.description.metadata
    assert facts.author == ""
    assert "4-bit palettes" in facts.shortDescription
    assert facts.userDefined["qwodel.format"] == "int4"
    assert facts.userDefined["qwodel.max_tokens"] == "256"
    assert facts.userDefined["qwodel.compute_units"] == "ALL"
    assert {each.name: bool(each.shortDescription) for each in spec.description.input} == {
        "input_ids": True, "attention_mask": True,
    }  # fmt: skip
    ranges = spec.description.input[0].type.multiArrayType.shapeRange.sizeRanges
    assert [(each.lowerBound, each.upperBound) for each in ranges] == [(1, 1), (1, 256)]
    assert (
        spec.description.output[0].type.multiArrayType.ArrayDataType.Name(
            spec.description.output[0].type.multiArrayType.dataType
        )
        == "FLOAT16"
    )
    assert spec.specificationVersion == ct.target.iOS18


@pytest.mark.slow
def test_side_files_lie_beside_the_package(stories15m: Path, whole: Made) -> None:
    names = {file.name for file in whole.folder.iterdir()}
    beside = {"config.json", "tokenizer.model", "tokenizer_config.json"}
    assert names == {"stories15M.mlpackage", "qwodel.manifest.json"} | beside
    for name in beside:
        assert (whole.folder / name).read_bytes() == (stories15m / name).read_bytes()


@pytest.mark.slow
def test_minilm_keeps_its_sentences_apart(minilm: Path, tmp_path: Path) -> None:
    texts = [
        "A cat sleeps on the sofa.",
        "A kitten naps on the couch.",
        "The stock market fell sharply today.",
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        reference = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32)(
            **batch
        ).last_hidden_state
    wanted = _embed(reference, batch["attention_mask"])
    made = make(minilm, tmp_path, "int4", input_shape=(3, 64), seq_length=64)
    found = made.run(**{key: batch[key].int() for key in ("input_ids", "attention_mask")})[
        "last_hidden_state"
    ]
    embedded = _embed(found, batch["attention_mask"])
    assert torch.cosine_similarity(embedded, wanted).min() > 0.9
    assert float(embedded[0] @ embedded[1]) > 0.5 > 0.3 > float(embedded[0] @ embedded[2])
    assert (made.folder / "tokenizer.json").is_file()
    assert (made.folder / "1_Pooling" / "config.json").is_file()
    assert made.info["unplaced"] == ["pooler.dense.weight"]
    # 30522 channels do not divide by 32; the largest divisor below is taken.
    assert made.info["groups"]["embeddings.word_embeddings.weight"] == 30522 / 6
    assert made.program.spec.description.metadata.license == "apache-2.0"


def _embed(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean pooling and normalization, as the model's card has it."""
    wide = mask[..., None].float()
    return torch.nn.functional.normalize((hidden * wide).sum(1) / wide.sum(1), dim=1)


@pytest.mark.slow
def test_a_trained_albert_from_a_pickle(rxn_albert: Path, tmp_path: Path) -> None:
    made = make(rxn_albert, tmp_path, "int8_symmetric")
    assert made.info["evaluated"]["cosine"] > 0.99
    assert made.info["bits_per_weight"] < 9.5


def test_a_vision_model_takes_an_image(tiny_vit: Path, tmp_path: Path) -> None:
    (tmp_path / "vit").mkdir()
    for file in tiny_vit.iterdir():
        (tmp_path / "vit" / file.name).write_bytes(file.read_bytes())
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = {"image_mean": mean, "image_std": std, "rescale_factor": 1 / 255}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    made = make(tmp_path / "vit", tmp_path / "out", "int6")
    image_type = made.program.spec.description.input[0].type.imageType
    assert (image_type.width, image_type.height) == (32, 32)
    assert image_type.ColorSpace.Name(image_type.colorSpace) == "RGB"
    pixels = torch.randint(0, 256, (1, 3, 32, 32)).float()
    normalized = (pixels / 255 - torch.tensor(mean).reshape(1, 3, 1, 1)) / torch.tensor(std).reshape(
        1, 3, 1, 1
    )
    model = transformers.AutoModelForImageClassification.from_pretrained(tiny_vit, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(normalized).logits
    found = made.run(image=pixels)["logits"]
    assert float((found - wanted).norm() / wanted.norm()) < 0.15
    whole = make(tmp_path / "vit", tmp_path / "out", "float16").run(image=pixels)["logits"]
    assert float((whole - wanted).norm() / wanted.norm()) < 1e-2


def test_a_stateful_decoder_continues_where_it_was(short_stories: Path, tmp_path: Path) -> None:
    made = make(short_stories, tmp_path, "int8_symmetric", stateful=True, seq_length=64)
    program = made.program
    assert {each.name for each in program.spec.description.state} == {"keys_0", "values_0"}
    ids = torch.randint(1, 4000, (1, 20)).int()
    evaluator = Evaluator(program)
    states, whole = evaluator.states(), evaluator.states()
    ones = torch.ones_like(ids)
    parts = [
        evaluator.run({"input_ids": ids[:, a:b], "attention_mask": ones[:, :b]}, states)["logits"]
        for a, b in ((0, 7), (7, 8), (8, 12), (12, 20))
    ]
    once = evaluator.run({"input_ids": ids, "attention_mask": ones}, whole)["logits"]
    assert torch.allclose(torch.cat(parts, 1), once, atol=2e-2, rtol=1e-2)
    assert made.info["evaluated"]["cosine"] > 0.99
    model = transformers.AutoModelForCausalLM.from_pretrained(short_stories, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(ids.long()).logits
    assert float((once - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize(
    ("name", "options", "operation"),
    [
        ("int8_linear", {"group_size": 32}, "constexpr_blockwise_shift_scale"),
        ("int8_symmetric", {"granularity": "per_tensor"}, "constexpr_affine_dequantize"),
        ("int6", {"mode": "uniform", "group_size": 8}, "constexpr_lut_to_dense"),
        ("int6", {"group_size": 16, "shapes": "enumerated", "lengths": (8, 32)}, "constexpr_lut_to_dense"),
        ("int4", {"shapes": "fixed", "input_shape": (2, 24)}, "constexpr_lut_to_dense"),
    ],
)
def test_granularities_and_shapes(
    short_stories: Path, tmp_path: Path, name: str, options: dict[str, Any], operation: str
) -> None:
    made = make(short_stories, tmp_path, name, **options)
    assert set(made.info["compressed"]) == {operation}
    groups = made.info["groups"]["model.layers.0.mlp.down_proj.weight"]
    expected = {"per_tensor": 1}.get(options.get("granularity", ""))
    if expected is None:
        size = options.get("group_size", 32)
        expected = 288 * 768 // size if name.startswith("int8") else 288 // size
    assert groups == expected
    array = made.program.spec.description.input[0].type.multiArrayType
    if "lengths" in options:
        assert sorted(list(each.shape) for each in array.enumeratedShapes.shapes) == [[1, 8], [1, 32]]
    if "input_shape" in options:
        assert list(array.shape) == [2, 24]
        assert array.WhichOneof("ShapeFlexibility") is None


def test_exclusions_keep_float16(short_stories: Path, tmp_path: Path) -> None:
    made = make(
        short_stories, tmp_path, "int4",
        exclude_layers=("model.layers.0.self_attn.q_proj", r"re:mlp\.(up|gate)_proj"), exclude_ops=("gather",),
    )  # fmt: skip
    kept = {name: why for name, why in made.info["kept"].items() if why.startswith("exclude")}
    assert kept == {
        "model.embed_tokens.weight": "exclude_ops",
        "model.layers.0.self_attn.q_proj.weight": "exclude_layers",
        "model.layers.0.mlp.up_proj.weight": "exclude_layers",
        "model.layers.0.mlp.gate_proj.weight": "exclude_layers",
    }
    assert not set(kept) & set(made.info["sqnr_db"])


def test_the_torch_model_is_gone_before_weights_are_compressed(
    short_stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    compress = module.compress

    def spy(*arguments: Any, **options: Any) -> Any:
        alive.append(_elements_alive())
        return compress(*arguments, **options)

    start = _elements_alive()
    monkeypatch.setattr(module, "compress", spy)
    make(short_stories, tmp_path, "int8_linear")
    assert alive[0] - start < 500_000  # the model has 2.1 million


def _elements_alive() -> int:
    gc.collect()
    return sum(each.numel() for each in gc.get_objects() if isinstance(each, torch.Tensor))


@pytest.mark.slow
def test_progress_is_told_and_the_same_source_gives_the_same_bytes(
    short_stories: Path, short: dict[str, Made], tmp_path: Path
) -> None:
    seen: list[tuple[int, str, str]] = []
    again = make(
        short_stories, tmp_path, "int4", workers=1, progress_callback=lambda *event: seen.append(event)
    )
    for file in ("weights/weight.bin", "model.mlmodel"):
        first, second = (made.package / "Data" / "com.apple.CoreML" / file for made in (short["int4"], again))
        assert first.read_bytes() == second.read_bytes(), file
    percents = [percent for percent, _, _ in seen]
    assert percents == sorted(percents)
    assert percents.count(100) == 1
    stages = list(dict.fromkeys(stage for _, stage, _ in seen))
    assert stages == ["resolve", "convert", "quantize", "verify", "publish", "complete"]
    messages = " ".join(message for _, _, message in seen)
    for part in (
        "PyTorch Frontend",
        "default pipeline",
        "backend_mlprogram",
        "compression pass",
        "s of k-means",
    ):
        assert part in messages
    assert len([message for _, stage, message in seen if stage == "convert"]) > 50


def test_float32_operations_stay_in_float32(
    save_tiny: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    made = make(tiny_llama, tmp_path, "float16", float32_ops=("reduce_mean", "rsqrt"))
    kinds = {
        next(iter(each.outputs.values())).dtype
        for each in made.program.operations
        if each.type in ("reduce_mean", "rsqrt")
    }
    assert kinds == {"FLOAT32"}
    assert made.info["evaluated"]["relative_error"] < 2e-3
