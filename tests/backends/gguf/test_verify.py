"""A written file that differs from its source is refused, whatever the difference."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from qwodel.backends.gguf.accounting import dropped_tensors
from qwodel.backends.gguf.verify import (
    PROBE,
    check_metadata,
    check_tensors,
    check_tokenization,
    check_tokenizer,
    measure,
    quality_of,
)
from qwodel.exceptions import IntegrityError
from qwodel.gguf_header import GGUFHeader, read_gguf_header
from qwodel.source import inspect_source
from tests.backends.gguf.conftest import quantize_by_hand


def _write(path: Path, tensors: dict[str, np.ndarray], **values: str) -> GGUFHeader:
    writer = GGUFWriter(path, "llama")
    for key, value in values.items():
        writer.add_string(key.replace("__", "."), value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_gguf_header(path)


def test_missing_extra_and_reshaped_tensors_are_named(tmp_path: Path) -> None:
    a, b = np.ones((2, 32), np.float32), np.ones((4, 16), np.float32)
    source = _write(tmp_path / "s.gguf", {"a": a, "b": b})
    check_tensors([source], source)
    with pytest.raises(IntegrityError, match="lacks the tensor b"):
        check_tensors([source], _write(tmp_path / "1.gguf", {"a": a}))
    with pytest.raises(IntegrityError, match="has, and the source lacks, the tensor c"):
        check_tensors([source], _write(tmp_path / "2.gguf", {"a": a, "b": b, "c": b}))
    with pytest.raises(IntegrityError, match=r"a has shape \(32, 2\), and \(2, 32\)"):
        check_tensors([source], _write(tmp_path / "3.gguf", {"a": a.T.copy(), "b": b}))


def test_lost_and_changed_metadata_is_named(tmp_path: Path) -> None:
    tensors = {"a": np.ones(4, np.float32)}
    source = _write(tmp_path / "s.gguf", tensors, tokenizer__chat_template="hello", general__name="x")
    check_metadata(source, source)
    with pytest.raises(IntegrityError, match="lost the metadata key tokenizer.chat_template"):
        check_metadata(source, _write(tmp_path / "1.gguf", tensors, general__name="x"))
    with pytest.raises(IntegrityError, match="metadata value general.name changed"):
        changed = _write(tmp_path / "2.gguf", tensors, tokenizer__chat_template="hello", general__name="y")
        check_metadata(source, changed)


def test_damaged_weights_are_found(stories_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.gguf"
    quantize_by_hand(stories_gguf, path, 2)
    source, output = read_gguf_header(stories_gguf), read_gguf_header(path)
    good = measure([source], output)
    assert min(each.sqnr_db for each in good) > 15
    tensor = output.tensors["blk.3.attn_q.weight"]
    noise = np.random.default_rng(0).integers(0, 255, tensor.nbytes, dtype=np.uint8)
    with path.open("r+b") as file:
        file.seek(tensor.begin)
        file.write(noise.tobytes())
    with pytest.raises(IntegrityError, match=r"blk\.3\.attn_q\.weight decodes to something else"):
        measure([source], output)


def test_a_wrong_tokenizer_is_found(smollm2: Path, smollm2_gguf: Path, tmp_path: Path) -> None:
    header = read_gguf_header(smollm2_gguf)
    found = check_tokenizer(smollm2, header)
    assert found == {"vocabulary": 49152, "bos": "<|im_start|>", "eos": "<|im_end|>", "chat_template": True}
    other = tmp_path / "other"
    shutil.copytree(smollm2, other, ignore=shutil.ignore_patterns("*.safetensors"))
    (other / "chat_template.jinja").write_text("{{ other }}")
    with pytest.raises(IntegrityError, match="chat template differs"):
        check_tokenizer(other, header)
    config = other / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"'))
    (other / "chat_template.jinja").write_text((smollm2 / "chat_template.jinja").read_text())
    assert check_tokenizer(other, header)["eos"] == "<|im_end|>"  # config.json names it
    for name in ("config.json", "generation_config.json"):
        (other / name).unlink()
    with pytest.raises(IntegrityError, match=r"the eos token is '<\|im_end\|>'"):
        check_tokenizer(other, header)
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"Ġthe":', '"Ġteh":'))
    with pytest.raises(IntegrityError, match="'Ġteh' in tokenizer.json"):
        check_tokenizer(other, header)


def test_other_tokens_are_refused_unless_they_spell_the_text(smollm2: Path) -> None:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(PROBE, add_special_tokens=False).ids
    assert check_tokenization(smollm2, {"probe_tokens": ids, "probe_text": PROBE}) == "identical"
    assert check_tokenization(smollm2, {"probe_tokens": [1], "probe_text": f" {PROBE}"}) == "text survives"
    with pytest.raises(IntegrityError, match="tokenizes otherwise"):
        check_tokenization(smollm2, {"probe_tokens": [1], "probe_text": "garbage"})


def test_tensors_the_converter_left_out_are_listed(stories15m: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    header = _convert(stories15m, tmp_path / "a.gguf")
    assert dropped_tensors(inspect_source(stories15m), header) == []
    model = tmp_path / "model"
    shutil.copytree(stories15m, model)
    (model / "model.safetensors").chmod(0o644)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(24)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    header = _convert(model, tmp_path / "b.gguf")
    assert dropped_tensors(inspect_source(model), header) == ["model.layers.0.self_attn.rotary_emb.inv_freq"]


def _convert(model: Path, target: Path) -> GGUFHeader:
    from qwodel.backends.gguf.native import run_worker
    from qwodel.backends.gguf.toolchain import converter

    request = {
        "script": str(converter().script),
        "arguments": [str(model), "--outfile", str(target), "--outtype", "f32"],
    }
    run_worker("convert", request)
    assert len(GGUFReader(target).tensors) > 0
    return read_gguf_header(target)


def test_sqnr() -> None:
    x = np.array([[3.0, 4.0]], np.float32)
    for reference, estimate, expected in (
        (x, x, np.inf), (x, x + 0.5, 10 * np.log10(25 / 0.5)), (x, x * np.nan, -np.inf), (x * 0, x, -np.inf),
    ):  # fmt: skip
        assert quality_of("a", reference, estimate).sqnr_db == pytest.approx(expected)
    assert quality_of("a", x, x + 0.5).mse == 0.25
