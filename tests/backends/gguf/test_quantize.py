"""Real llama.cpp on real weights."""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from qwodel import Quantizer, quantize
from qwodel.backends.gguf.formats import FILE_TYPES
from qwodel.backends.gguf.imatrix import read_imatrix
from qwodel.gguf_header import read_gguf_header
from tests.backends.gguf.conftest import greedy, load, logits, quantize_by_hand

PROMPT = "Once upon a time, there was a little girl named Lily."


@pytest.mark.parametrize("name", ["Q4_K_M", "Q8_0", "Q2_K", "IQ4_NL"])
def test_stories15m_is_byte_for_byte_what_llama_cpp_gives(
    stories15m: Path, stories_gguf: Path, tmp_path: Path, name: str
) -> None:
    path = quantize(stories15m, tmp_path / "out", "gguf", name)
    assert path.name == f"stories15M-{name}.gguf"
    by_hand = tmp_path / "by-hand.gguf"
    quantize_by_hand(stories_gguf, by_hand, FILE_TYPES[name].number)
    assert path.read_bytes() == by_hand.read_bytes()
    assert {p.name for p in path.parent.iterdir()} == {path.name, f"stories15M-{name}.manifest.json"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q4_K_M", "Q8_0", "Q2_K"])
def test_smollm2_is_byte_for_byte_what_llama_cpp_gives(
    smollm2: Path, smollm2_gguf: Path, tmp_path: Path, name: str
) -> None:
    quantizer = Quantizer("gguf", smollm2, tmp_path / "out")
    path = quantizer.quantize(name)
    by_hand = tmp_path / "by-hand.gguf"
    quantize_by_hand(smollm2_gguf, by_hand, FILE_TYPES[name].number)
    assert path.read_bytes() == by_hand.read_bytes()
    info = quantizer.get_model_info()
    assert info["file_size"] == path.stat().st_size
    assert info["quantized_model"] == str(path)
    assert info["tokenizer"] == {
        "vocabulary": 49152, "bos": "<|im_start|>", "eos": "<|im_end|>", "chat_template": True, "tokenization": "identical",
    }  # fmt: skip
    assert info["dropped"] == []


@pytest.mark.slow
def test_smollm2_iq4_nl_from_a_gguf(smollm2_gguf: Path, tmp_path: Path) -> None:
    path = quantize(smollm2_gguf, tmp_path / "out", "gguf", "IQ4_NL")
    assert path.name == "SmolLM2-135M-Instruct-IQ4_NL.gguf"
    quantize_by_hand(smollm2_gguf, tmp_path / "by-hand.gguf", FILE_TYPES["IQ4_NL"].number)
    assert path.read_bytes() == (tmp_path / "by-hand.gguf").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "gguf"), [("short_smollm2", "short_smollm2_gguf"), ("stories15m", "stories_gguf")]
)
def test_an_iq2_type_with_an_importance_matrix(
    request: pytest.FixtureRequest, tmp_path: Path, wikitext: Path, model: str, gguf: str
) -> None:
    source: Path = request.getfixturevalue(model)
    origin: Path = request.getfixturevalue(gguf)
    quantizer = Quantizer(
        "gguf", source, tmp_path, calibration_dataset=wikitext, num_samples=2, seq_length=128,
    )  # fmt: skip
    path = quantizer.quantize("IQ2_XS")
    info = quantizer.get_model_info()
    assert info["tensor_types"]["IQ2_XS"] > 0
    matrix = tmp_path / info["importance_matrix"]["file"]
    # The same file by hand, with the published matrix and the keys llama.cpp's own tool writes.
    weights = read_imatrix(matrix).weights()
    entries = (llama_cpp.llama_model_imatrix_data * (len(weights) + 1))()
    for slot, (name, values) in zip(entries, weights.items(), strict=False):
        slot.name, slot.size = name.encode(), values.size
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    keys = _overrides(matrix.name, "wiki.valid.tokens", len(weights), 2)
    quantize_by_hand(
        origin, tmp_path / "by-hand.gguf", FILE_TYPES["IQ2_XS"].number, imatrix=entries, kv_overrides=keys
    )
    assert path.read_bytes() == (tmp_path / "by-hand.gguf").read_bytes()


def _overrides(
    file: str, dataset: str, entries: int, chunks: int
) -> ctypes.Array[llama_cpp.llama_model_kv_override]:
    array = (llama_cpp.llama_model_kv_override * 5)()
    for slot, (key, value) in zip(array, [("file", file), ("dataset", dataset)], strict=False):
        slot.key, slot.tag = f"quantize.imatrix.{key}".encode(), llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
        slot.value.val_str = value.encode()
    for slot, (key, number) in zip(
        array[2:4], [("entries_count", entries), ("chunks_count", chunks)], strict=True
    ):
        slot.key, slot.tag = f"quantize.imatrix.{key}".encode(), llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
        slot.value.val_i64 = number
    return array


def test_q8_0_writes_what_the_source_writes(stories15m: Path, stories_gguf: Path, tmp_path: Path) -> None:
    path = quantize(stories15m, tmp_path, "gguf", "Q8_0")
    text = greedy(path, PROMPT, 30)
    assert text == greedy(stories_gguf, PROMPT, 30)
    assert len(text) > 60


@pytest.mark.slow
def test_smollm2_q8_0_writes_what_the_source_writes(smollm2_gguf: Path, tmp_path: Path) -> None:
    path = quantize(smollm2_gguf, tmp_path, "gguf", "Q8_0")
    prompt = "Once upon a time"
    assert greedy(path, prompt, 30) == greedy(smollm2_gguf, prompt, 30)


@pytest.fixture(scope="module")
def stories(stories_gguf: Path) -> list[str]:
    """Stories the model wrote itself."""
    return [greedy(stories_gguf, prompt, 200) for prompt in _prompts()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q2_K", "IQ3_M"])
def test_an_importance_matrix_lowers_the_kl_divergence(
    stories: list[str], stories_gguf: Path, tmp_path: Path, name: str
) -> None:
    """Calibrated on some of the stories, scored on others."""
    train, held_out = ("\n".join(stories[:4]) + "\n") * 3, " ".join(stories[4:]).encode()
    reference = logits(stories_gguf, held_out)

    def divergence(path: Path) -> float:
        other = logits(path, held_out)
        return float((np.exp(reference) * (reference - other)).sum(axis=-1).mean())

    plain = quantize(stories_gguf, tmp_path / "plain", "gguf", name)
    matrix = quantize(
        stories_gguf, tmp_path / "matrix", "gguf", name, calibration_dataset=[train], seq_length=64
    )
    assert divergence(matrix) < divergence(plain)


def _prompts() -> list[str]:
    return [
        "Once upon a time", "One day, a dog", "Tom and Sue went to the park", "The big red bird",
        "Mia had a small blue boat", "It was raining and Ben",
    ]  # fmt: skip


def test_the_matrix_is_the_sum_of_squared_activations(
    stories15m: Path, stories_gguf: Path, tmp_path: Path
) -> None:
    """Against an independent forward pass of the float32 model in torch."""
    from transformers import LlamaForCausalLM

    text = "Lily and Ben went to the park. They saw a big dog and a small cat. " * 8
    quantizer = Quantizer(
        "gguf", stories_gguf, tmp_path, calibration_dataset=iter([text]), seq_length=32, num_samples=2
    )
    quantizer.quantize("Q8_0")
    quantizer.quantize("Q8_0", overwrite=True)
    info = quantizer.get_model_info()
    report = info["importance_matrix"]
    manifest = Path(info["manifest"]).read_text("utf-8")
    assert '"calibration_dataset": "1 item given in Python"' in manifest
    assert "Lily" not in manifest + repr(info)
    matrix = read_imatrix(tmp_path / report["file"])
    assert (matrix.chunk_count, matrix.chunk_size, matrix.datasets) == (2, 32, ("texts given in Python",))

    llama = load(stories_gguf, vocab_only=True)
    tokens = llama.tokenize((text + "\n").encode())[:64]
    chunks = torch.tensor(tokens).reshape(2, 32)
    chunks[:, 0] = llama.token_bos()
    model = LlamaForCausalLM.from_pretrained(stories15m).eval()
    layers = model.model.layers
    modules = {"ffn_down": "mlp.down_proj", "attn_q": "self_attn.q_proj", "attn_output": "self_attn.o_proj"}
    seen: dict[str, torch.Tensor] = {}
    for index in (0, 5):
        for short, path in modules.items():
            key = f"blk.{index}.{short}.weight"
            layers[index].get_submodule(path).register_forward_pre_hook(
                lambda _, args, key=key: seen.__setitem__(key, args[0].double().square().sum((0, 1)))
            )
    with torch.no_grad():
        model(chunks)
    for key, expected in seen.items():
        entry = matrix.entries[key]
        assert entry.counts.tolist() == [64]
        # llama.cpp keeps keys and values of the attention in half precision.
        np.testing.assert_allclose(
            entry.sums[0], expected.numpy(), rtol=2e-2, atol=1e-3 * float(expected.max())
        )


def test_a_computed_matrix_is_kept_and_used_again(stories_gguf: Path, tmp_path: Path) -> None:
    def run(**options: object) -> tuple[list[str], str]:
        stages: list[str] = []
        quantizer = Quantizer(
            "gguf", stories_gguf, tmp_path, lambda _, stage, message: stages.append(message),
            calibration_dataset=["A cat sat on a mat. " * 40], seq_length=32, num_samples=2, overwrite=True, **options,
        )  # fmt: skip
        quantizer.quantize("Q4_0")
        return stages, quantizer.get_model_info()["importance_matrix"]["file"]

    first, name = run()
    again, same = run()
    assert any("importance matrix: sample" in message for message in first)
    assert not any("importance matrix: sample" in message for message in again)
    assert same == name
    loaded = quantize(stories_gguf, tmp_path / "loaded", "gguf", "Q4_0", imatrix=tmp_path / name)
    assert loaded.read_bytes() == (tmp_path / "stories15M-Q4_0.gguf").read_bytes()


def test_types_can_be_chosen_tensor_by_tensor(stories_gguf: Path, tmp_path: Path) -> None:
    path = quantize(
        stories_gguf, tmp_path, "gguf", "q4_0",
        tensor_types={r"blk\.0\.attn_[qk]": "q8_0", "ffn_down": "Q5_1"},
        output_tensor_type="f16", token_embedding_type="q5_0", nthread=1,
    )  # fmt: skip
    types = {name: tensor.type for name, tensor in read_gguf_header(path).tensors.items()}
    assert types["blk.0.attn_q.weight"] == types["blk.0.attn_k.weight"] == "Q8_0"
    assert types["blk.1.attn_q.weight"] == "Q4_0"
    assert types["blk.3.ffn_down.weight"] == "Q5_1"
    assert types["token_embd.weight"] == "Q5_0"


def test_pure_gives_one_type(stories_gguf: Path, tmp_path: Path) -> None:
    path = quantize(stories_gguf, tmp_path, "gguf", "Q5_0", pure=True)
    assert Counter(tensor.type for tensor in read_gguf_header(path).tensors.values()) == {
        "Q5_0": 43,
        "F32": 13,
    }


def test_fallbacks_and_quality_are_reported(
    stories15m: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantizer = Quantizer("gguf", stories15m, tmp_path)
    path = quantizer.quantize("Q4_K_M")
    info = quantizer.get_model_info()
    header = read_gguf_header(path)
    assert len(info["fallbacks"]) == 36
    for item in info["fallbacks"]:
        assert header.tensors[item["tensor"]].type == item["got"] != item["asked"]
        assert header.tensors[item["tensor"]].shape[-1] % 256
    assert "36 of 56 tensors could not be given the type" in caplog.text
    assert info["bits_per_weight"] == pytest.approx(header.tensor_bytes * 8 / header.parameters, abs=1e-3)
    assert info["tensor_types"] == dict(Counter(t.type for t in header.tensors.values()))
    manifest = json.loads(Path(info["manifest"]).read_text())
    assert manifest["fallbacks"] == info["fallbacks"]
    assert manifest["source"]["parameters"] == 15_191_712
    assert manifest["recipe"]["pure"] is False
    assert manifest["output"] == {"name": path.name, "bytes": path.stat().st_size}


def test_reported_quality_is_that_of_the_decoded_file(stories_gguf: Path, tmp_path: Path) -> None:
    quantizer = Quantizer("gguf", stories_gguf, tmp_path)
    path = quantizer.quantize("Q4_0")
    reported = quantizer.get_model_info()["sqnr_db"]
    origin = {tensor.name: tensor for tensor in GGUFReader(stories_gguf).tensors}
    assert len(reported) == 43
    for tensor in GGUFReader(path).tensors:
        if tensor.name not in reported:
            continue
        w = np.array(origin[tensor.name].data, np.float64)
        e = w - dequantize(tensor.data, tensor.tensor_type).reshape(w.shape)
        whole = 10 * np.log10((w**2).sum() / (e**2).sum())
        # Eight sampled rows speak for the whole tensor.
        assert reported[tensor.name] == pytest.approx(whole, abs=2.0)


def test_a_quantized_gguf_is_quantized_again_only_when_asked(stories_gguf: Path, tmp_path: Path) -> None:
    from qwodel.exceptions import ValidationError

    q8 = quantize(stories_gguf, tmp_path, "gguf", "Q8_0")
    with pytest.raises(ValidationError, match=r"quantized already \(Q8_0\)"):
        quantize(q8, tmp_path, "gguf", "Q4_0")
    path = quantize(q8, tmp_path, "gguf", "Q4_0", allow_requantize=True)
    assert path.name == "stories15M-Q4_0.gguf"
    assert {t.type for t in read_gguf_header(path).tensors.values()} == {"F32", "Q4_0", "Q8_0"}


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float32, "F32")]
)
def test_the_intermediate_keeps_the_sources_type(
    stories15m: Path, tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    source = _copy_as(stories15m, tmp_path / "src", dtype)
    quantizer = Quantizer("gguf", source, tmp_path / "out", keep_intermediate=True)
    quantizer.quantize("Q8_0")
    kept = Path(quantizer.get_model_info()["intermediate"])
    assert kept.name == f"src-{kind}.gguf"
    assert {t.type for t in read_gguf_header(kept).tensors.values() if len(t.shape) > 1} == {kind}
    assert {p.name for p in kept.parent.iterdir()} == {kept.name, "src-Q8_0.gguf", "src-Q8_0.manifest.json"}


def _copy_as(
    source: Path, target: Path, dtype: torch.dtype, *, sharded: bool = False, pickled: bool = False
) -> Path:
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    if pickled:
        torch.save(tensors, target / "pytorch_model.bin")
        return target
    names = sorted(tensors)
    parts = [names[::2], names[1::2]] if sharded else [names]
    files = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, target / file, {"format": "pt"})
    if sharded:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (target / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    return target


def test_shards_and_pickles_give_the_same_tensors(stories15m: Path, tmp_path: Path) -> None:
    whole = read_gguf_header(quantize(stories15m, tmp_path / "a", "gguf", "Q8_0"))
    for index, options in enumerate(({"sharded": True}, {"pickled": True})):
        source = _copy_as(stories15m, tmp_path / f"src{index}", torch.float32, **options)
        other = read_gguf_header(quantize(source, tmp_path / f"out{index}", "gguf", "Q8_0"))
        assert set(other.tensors) == set(whole.tensors)
        for name, tensor in other.tensors.items():
            mine = whole.tensors[name]
            assert _bytes(other.path, tensor.begin, tensor.nbytes) == _bytes(
                whole.path, mine.begin, mine.nbytes
            )


def _bytes(path: Path, begin: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(length)


def test_progress_rises_with_the_work_to_100_once(stories15m: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, str, str]] = []
    path = quantize(stories15m, tmp_path, "gguf", "Q8_0", progress_callback=lambda *event: seen.append(event))
    percents = [percent for percent, _, _ in seen]
    assert percents == sorted(percents)
    assert percents.count(100) == 1
    assert list(dict.fromkeys(stage for _, stage, _ in seen)) == [
        "resolve", "convert", "quantize", "verify", "publish", "complete",
    ]  # fmt: skip
    tensors = [message for _, stage, message in seen if stage == "quantize" and "blk." in message]
    assert len(tensors) >= 54
    assert seen[-1] == (100, "complete", str(path))


def test_a_format_for_other_models_warns_of_noise(
    stories_gguf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantize(stories_gguf, tmp_path, "gguf", "TQ2_0")
    assert "expect noise unless the model was trained for such weights" in caplog.text
    caplog.clear()
    quantize(stories_gguf, tmp_path, "gguf", "Q2_K")
    assert "expect noise" not in caplog.text
