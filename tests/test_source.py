from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwodel.exceptions import IntegrityError, ValidationError
from qwodel.source import inspect_source

CONFIG = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}


def _model(folder: Path, config: dict[str, object] | None = None, **tensors: torch.Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    save_file(tensors or {"model.embed_tokens.weight": torch.ones(8, 4)}, folder / "model.safetensors")
    return folder


def test_a_directory_is_described_from_its_headers(tmp_path: Path) -> None:
    folder = _model(
        tmp_path / "Tiny-1M",
        **{
            "model.embed_tokens.weight": torch.ones(8, 4, dtype=torch.bfloat16),
            "model.norm.weight": torch.ones(4),
        },
    )
    source = inspect_source(folder)
    assert source.describe() == {
        "model": str(folder),
        "name": "Tiny-1M",
        "path": str(folder),
        "input_format": "huggingface",
        "architecture": "LlamaForCausalLM",
        "parameters": 36,
        "tensors": 2,
        "dtypes": {"BF16": 32, "F32": 4},
        "weight_bytes": (folder / "model.safetensors").stat().st_size,
        "weight_files": ["model.safetensors"],
        "tied_embeddings": True,
        "revision": None,
    }


def test_shards_are_one_model_and_repeated_tensors_an_error(tmp_path: Path) -> None:
    folder = _model(tmp_path, **{"a": torch.ones(2, 2)})
    save_file({"b": torch.ones(3)}, folder / "second.safetensors")
    assert inspect_source(folder).parameters == 7
    save_file({"a": torch.ones(3)}, folder / "second.safetensors")
    with pytest.raises(ValidationError, match="'a' is in more than one"):
        inspect_source(folder)


def test_pickled_shards_are_read_and_shared_storage_counted_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    embed = torch.ones(5, 3)
    torch.save(
        {"model.embed_tokens.weight": embed, "lm_head.weight": embed},
        tmp_path / "pytorch_model-00001-of-00002.bin",
    )
    torch.save({"model.norm.weight": torch.ones(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    torch.save({"args": torch.ones(9)}, tmp_path / "training_args.bin")
    source = inspect_source(tmp_path)
    assert source.input_format == "huggingface"
    assert source.parameters == 18
    assert source.tied_embeddings is True
    assert len(source.weight_files) == 2


@pytest.mark.parametrize(
    ("tensors", "config", "tied"),
    [
        (("model.embed_tokens.weight",), {}, None),
        (("model.embed_tokens.weight",), {"architectures": ["X"]}, True),
        (("model.embed_tokens.weight",), {"tie_word_embeddings": False}, False),
        (("model.embed_tokens.weight",), {"text_config": {"tie_word_embeddings": False}}, False),
        (("model.embed_tokens.weight", "lm_head.weight"), {"architectures": ["X"]}, False),
        (("model.embed_tokens.weight", "lm_head.weight"), {"tie_word_embeddings": True}, True),
    ],
)
def test_tied_embeddings(
    tmp_path: Path, tensors: tuple[str, ...], config: dict[str, object], tied: bool | None
) -> None:
    folder = _model(tmp_path, config, **{name: torch.ones(4, 2) for name in tensors})
    assert inspect_source(folder).tied_embeddings is tied


def test_single_files_are_told_by_their_endings(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pth")
    assert inspect_source(tmp_path / "m.safetensors").input_format == "safetensors"
    assert inspect_source(tmp_path / "m.pth").input_format == "pytorch"
    (tmp_path / "m.onnx").write_bytes(b"x")
    with pytest.raises(ValidationError, match="no model file this library knows"):
        inspect_source(tmp_path / "m.onnx")


def test_wrong_paths_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="does not exist"):
        inspect_source(tmp_path / "nothing")
    with pytest.raises(ValidationError, match="it is empty"):
        inspect_source(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValidationError, match="no .safetensors, .bin, .gguf or .pt"):
        inspect_source(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(ValidationError, match="not readable JSON"):
        inspect_source(tmp_path)


def test_several_loose_models_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save({"w": torch.ones(2)}, tmp_path / name)
    with pytest.raises(ValidationError, match=r"several models: a\.pt, b\.pt"):
        inspect_source(tmp_path)


def test_truncated_weights_are_found_before_any_work(tmp_path: Path) -> None:
    folder = _model(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="truncated"):
        inspect_source(folder)


def test_a_split_gguf_needs_all_its_parts(tmp_path: Path, smollm2_gguf: Path) -> None:
    part = tmp_path / "m-00001-of-00002.gguf"
    part.symlink_to(smollm2_gguf)
    with pytest.raises(ValidationError, match=r"m-00002-of-00002\.gguf is missing"):
        inspect_source(part)


def test_only_headers_are_read(tmp_path: Path) -> None:
    # A sparse file: four terabytes that exist nowhere, behind a real header.
    size = 1 << 42
    entry = {"dtype": "U8", "shape": [1 << 21, 1 << 21], "data_offsets": [0, size]}
    raw = json.dumps({"w": entry}).encode()
    path = tmp_path / "huge.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + size)
    assert inspect_source(path).parameters == size


def test_a_real_model(smollm2: Path) -> None:
    source = inspect_source(smollm2)
    assert source.parameters == 134_515_008
    assert source.tied_embeddings is True
    assert source.dtypes == {"BF16": 134_515_008}
