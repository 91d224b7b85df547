"""PyTorch checkpoints as sources: the same bytes come out as from safetensors, and nothing is executed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwodel import quantize
from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.exceptions import IntegrityError, ValidationError
from tests.checkpoint.checkpoints import llama_weights

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    weights = llama_weights(2)
    weights["steps"] = torch.arange(7)
    weights["scalar"] = torch.tensor(0.5, dtype=torch.bfloat16)
    # Two names of one storage, and a stretch of a larger one.
    weights["tied.weight"] = weights["model.embed_tokens.weight"]
    weights["part.weight"] = torch.randn(6, 64, dtype=torch.float16)[2:4]
    return weights


def test_every_tensor_is_read_in_place(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "pytorch_model.bin")
    for low_memory in (False, True):
        with UnifiedSafetensorsLoader(tmp_path / "pytorch_model.bin", low_memory) as reader:
            assert set(reader) == set(weights)
            for name, value in weights.items():
                assert torch.equal(reader.get_tensor(name), value), name
            rows = reader.get_rows("model.embed_tokens.weight", 3, 9)
            assert torch.equal(rows, weights["model.embed_tokens.weight"][3:9])


def test_a_directory_of_shards_gives_the_bytes_of_safetensors(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    del weights["tied.weight"]
    names = sorted(weights)
    (tmp_path / "bin").mkdir()
    (tmp_path / "st").mkdir()
    shards = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
    for shard, inside in shards.items():
        torch.save({name: weights[name] for name in inside}, tmp_path / "bin" / shard)
    index = {"weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({"lr": 0.1}, tmp_path / "bin" / "training_args.bin")
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, tmp_path / "st" / "model.safetensors"
    )
    for folder in ("bin", "st"):
        (tmp_path / folder / "config.json").write_text(json.dumps(CONFIG))
    found = [
        load_file(
            quantize(tmp_path / folder, tmp_path / "out", backend="int8", format="int8_row")
            / "model.safetensors"
        )
        for folder in ("bin", "st")
    ]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_single_file_of_a_diffusion_model(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    torch.save({"blocks.0.proj.weight": weight}, tmp_path / "model.pth")
    path = quantize(tmp_path / "model.pth", tmp_path / "out", backend="fp8", format="fp8_e4m3")
    stored = load_file(path)
    decoded = stored["blocks.0.proj.weight"].float() * stored["blocks.0.proj.weight_scale"]
    assert float((decoded - weight).abs().max()) < 0.2


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def test_what_a_pickle_asks_for_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a.weight": torch.randn(64, 64), "b": Runs()}, tmp_path / "model.pth")
    with pytest.raises(ValidationError, match=r"posix\.system"):
        quantize(tmp_path / "model.pth", tmp_path / "out", backend="int8", format="int8_row")
    assert not (tmp_path / "ran").exists()


def test_views_old_files_and_missing_numbers_are_typed(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"a.weight": torch.randn(8, 6).T}, path)
    with pytest.raises(ValidationError, match="is a view"):
        UnifiedSafetensorsLoader(path)
    torch.save({"a.weight": torch.randn(8, 6)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValidationError, match=r"torch before 1\.6"):
        UnifiedSafetensorsLoader(path)
    torch.save({"a.weight": torch.randn(64, 64)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:-2000])
    with pytest.raises((IntegrityError, ValidationError)):
        UnifiedSafetensorsLoader(path)
