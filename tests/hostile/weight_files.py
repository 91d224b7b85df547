"""Entry points that take weights: files of each kind, a model directory, and a whole run."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

from qwodel import quantize
from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.source.dequantize_sources import resolve_sources
from qwodel.checkpoint.source.weights import read_weights
from qwodel.source import inspect_source
from tests.hostile.mutations import damaged_bytes, damaged_json, framed, rezipped, split_frame

__all__ = ["Attempt", "gguf", "model_directory", "pickle_bomb", "pickled", "quantized", "safetensors"]

Attempt = Callable[[random.Random], None]
"""One case: damages a file and reads it; raises what the library raises."""

_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "vocab_size": 32,
    "tie_word_embeddings": False, "torch_dtype": "float32", "text_config": {"hidden_size": 16},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16],
                            "config_groups": {"g": {"format": "float-quantized", "weights": {"num_bits": 8}}}},
}  # fmt: skip


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    marker = torch.tensor(list(b'{"format": "float8_e4m3fn", "group_size": 16}'), dtype=torch.uint8)
    return {
        "model.embed_tokens.weight": torch.randn(32, 16, generator=generator),
        "model.layers.0.mlp.up_proj.weight": torch.randn(16, 16, generator=generator),
        "model.layers.0.mlp.down_proj.weight": torch.randn(16, 16, generator=generator).to(
            torch.float8_e4m3fn
        ),
        "model.layers.0.mlp.down_proj.weight_scale": torch.ones(1, 1),
        "model.layers.0.mlp.down_proj.comfy_quant": marker,
        "model.layers.0.norm.weight": torch.ones(16),
        "lm_head.weight": torch.randn(32, 16, generator=generator),
    }


def safetensors(folder: Path) -> Attempt:
    raw = save(_weights(), {"format": "pt", "_quantization_metadata": '{"layers": {"a": {"format": "x"}}}'})
    header, data = split_frame(raw)
    path = folder / "model.safetensors"

    def attempt(rng: random.Random) -> None:
        whole = framed(damaged_json(header, rng), data)
        path.write_bytes(whole if rng.random() < 0.6 else damaged_bytes(raw, rng, [whole]))
        inspect_source(path)
        for _ in read_weights(path):
            pass

    return attempt


def pickle_bomb(rng: random.Random) -> bytes:
    """Few bytes that ask for much: shared and cyclic dictionaries, memo indexes, nested keys, lengths."""
    levels = rng.choice((1, 5, 40))
    shared = b"".join(
        b"}(X\1\0\0\0ah" + bytes([i]) + b"X\1\0\0\0bh" + bytes([i]) + b"uq" + bytes([i + 1])
        for i in range(levels)
    )
    big = rng.choice((1 << 20, 1 << 28, (1 << 32) - 1)).to_bytes(4, "little")
    return rng.choice((
        b"\x80\x02}q\0" + shared + b".",
        b"\x80\x02}q\0X\1\0\0\0ah\0s.",
        b"\x80\x02}q\0X\1\0\0\0ar" + big + b"h\0s.",
        b"\x80\x02N" + b"\x85" * 200_000 + b".",
        b"\x80\x02}N" + b"\x85" * 200_000 + b"Ns.",
        b"\x80\x02}N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(40)) + b"Ns.",
        b"\x80\x05\x96" + big + b"\0\0\0\0abc.",
        b"\x80\x02B" + big + b"abc.",
        b"\x80\x02X\2\0\0\0\xff\xfe.",
        b"\x80\x02Iabc\n.",
        b"\x80\x02I" + b"9" * 5000 + b"\n.",
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02cposix\nsystem\nX\4\0\0\0true\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n]\x85Rb.",
    ))  # fmt: skip


def pickled(folder: Path) -> Attempt:
    state = {**_weights(), "nested": {"step": 3, "weight": torch.ones(3)}, "half": torch.ones(2).half()}
    buffers = [io.BytesIO(), io.BytesIO()]
    for buffer, as_zip in zip(buffers, (True, False), strict=True):
        torch.save(state, buffer, _use_new_zipfile_serialization=as_zip)
    archive, legacy = (buffer.getvalue() for buffer in buffers)
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        stream = opened.read(next(name for name in opened.namelist() if name.endswith("/data.pkl")))
    path = folder / "pytorch_model.bin"

    def attempt(rng: random.Random) -> None:
        kind = rng.random()
        if kind < 0.4:
            content = rezipped(archive, {"/data.pkl": damaged_bytes(stream, rng, [pickle.dumps(state.keys)])})
        elif kind < 0.55:
            content = rezipped(archive, {"/data.pkl": pickle_bomb(rng)})
        elif kind < 0.6:
            packing = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
            content = rezipped(archive, {"/data.pkl": bytes(1 << 22)}, packing)
        else:
            content = damaged_bytes(archive if kind < 0.8 else legacy, rng, [legacy])
        path.write_bytes(content)
        inspect_source(path)

    return attempt


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _gguf(rng: random.Random) -> bytes:
    """A small GGUF file; each field is now and then not what it should be."""

    def odd(right: int, bits: int = 32) -> int:
        wrong = (
            0,
            1,
            2,
            3,
            4,
            31,
            33,
            255,
            1 << 20,
            (1 << 31) - 1,
            1 << 31,
            (1 << bits) - 1,
            1 << (bits - 1),
        )
        return right if rng.random() > 0.04 else rng.choice(wrong) % (1 << bits)

    names = [b"token_embd.weight", b"blk.0.ffn_up.weight", b"output.weight"]
    if rng.random() < 0.05:
        names[1] = names[0]
    if rng.random() < 0.05:
        names[2] = rng.choice((b"", b"\xff\xfe", b"x" * 5000, b"../x\0"))
    alignment = odd(32)
    kind = rng.choice((4, 4, 4, 4, 5, 8, 10, 6, 7))
    code = {4: "<I", 5: "<i", 10: "<Q", 6: "<f", 7: "<?"}.get(kind)
    value = (
        _text(b"32")
        if code is None
        else struct.pack(code, alignment if kind in (4, 10) else 32 * (kind != 5) - 32 * (kind == 5))
    )
    values = [
        _text(b"general.architecture") + struct.pack("<I", odd(8)) + _text(b"llama"),
        _text(b"general.alignment") + struct.pack("<I", kind) + value,
        _text(b"tokens") + struct.pack("<IIQ", odd(9), odd(8), odd(2, 64)) + _text(b"a") + _text(b"b"),
        _text(b"nested") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * rng.choice((1, 1, 3, 3000)) + struct.pack("<IQ", 4, 0),
    ]  # fmt: skip
    if rng.random() < 0.05:
        values.append(values[0])
    infos, offset = [], 0
    for name in names:
        dimensions = odd(2)
        shape = [odd(32, 64) for _ in range(min(dimensions, 8))]
        infos.append(
            _text(name)
            + struct.pack(f"<I{len(shape)}Q", dimensions, *shape)
            + struct.pack("<IQ", odd(0), odd(offset, 64))
        )
        offset += 32 * 32 * 4
    head = b"GGUF" + struct.pack("<IQQ", odd(3), odd(len(infos), 64), odd(len(values), 64))
    raw = head + b"".join(values) + b"".join(infos)
    return raw + bytes(-len(raw) % 32 + offset)


def gguf(folder: Path) -> Attempt:
    def attempt(rng: random.Random) -> None:
        raw = _gguf(rng)
        plain = folder / "model.gguf"
        path = (
            plain
            if rng.random() < 0.9
            else folder
            / rng.choice(("m-00000-of-00000.gguf", "m-00002-of-00001.gguf", "m-00001-of-99999.gguf"))
        )
        path.write_bytes(raw if rng.random() < 0.6 else damaged_bytes(raw, rng))
        inspect_source(path)

    return attempt


def _sharded(folder: Path) -> dict[str, Any]:
    """Write two shards; return their index."""
    weights = _weights()
    index: dict[str, str] = {}
    for place, names in enumerate((list(weights)[:3], list(weights)[3:]), 1):
        file = f"model-{place:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    return {"metadata": {"total_size": 1}, "weight_map": index}


def model_directory(folder: Path) -> Attempt:
    root = folder / "model"
    root.mkdir(exist_ok=True)
    index = _sharded(root)
    pipeline = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}

    def attempt(rng: random.Random) -> None:
        place = rng.randrange(4)
        config = damaged_json(_CONFIG, rng) if place in (0, 2) else json.dumps(_CONFIG).encode()
        listed = damaged_json(index, rng) if place in (1, 2) else json.dumps(index).encode()
        (root / "config.json").write_bytes(config)
        (root / "model.safetensors.index.json").write_bytes(listed)
        (root / "model_index.json").unlink(missing_ok=True)
        if place == 3:
            (root / "model_index.json").write_bytes(damaged_json(pipeline, rng))
        source = inspect_source(root)
        with UnifiedSafetensorsLoader(root, low_memory=True) as reader:
            resolve_sources(reader, source.config)

    return attempt


def quantized(folder: Path) -> Attempt:
    root = folder / "source"
    root.mkdir(exist_ok=True)
    weights = {name: tensor.float() for name, tensor in _weights().items() if "down_proj" not in name}
    header, data = split_frame(save(weights))
    raw = save(weights)
    plain = {key: value for key, value in _CONFIG.items() if key != "quantization_config"}

    def attempt(rng: random.Random) -> None:
        place = rng.randrange(3)
        config = damaged_json(plain, rng) if place == 0 else json.dumps(plain).encode()
        whole = framed(damaged_json(header, rng), data) if place == 1 else raw
        (root / "config.json").write_bytes(config)
        (root / "model.safetensors").write_bytes(damaged_bytes(raw, rng, [whole]) if place == 2 else whole)
        target = folder / "out"
        shutil.rmtree(target, ignore_errors=True)
        quantize(root, target, "int8", "int8_row")

    return attempt
