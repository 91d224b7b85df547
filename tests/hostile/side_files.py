"""Entry points that take everything beside weights: rules, adapters, statistics, calibration data."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors.torch import save

from qwodel.algorithms.gram import InputStatistics
from qwodel.backends.gguf.imatrix import ImatrixEntry, ImportanceMatrix, read_imatrix, write_imatrix
from qwodel.calibration.texts import load_documents
from qwodel.checkpoint.lora.merge import LoraSource, load_lora_for_merging, plan_merges
from qwodel.checkpoint.plan.layer_config import LayerConfig, load_layer_config
from qwodel.checkpoint.rounding.statistics import StatisticsEntry, StatisticsFile, write_statistics
from qwodel.smoothquant.calibration import load_activation_scales
from tests.hostile.mutations import damaged_bytes, damaged_json, framed, rezipped, split_frame
from tests.hostile.weight_files import Attempt, pickle_bomb

__all__ = ["activation_scales", "calibration_data", "importance_matrix", "layer_rules", "lora", "statistics"]

_EXPRESSIONS = (
    "(a+)+$", "(a|a)*$", "(.*)(.*)(.*)(.*)x", "a?" * 30 + "a" * 30, "(", "*", "a{1,99999}", "(?:a{1000}){1000}",
    r"(a+)+\1$", "(?P<x>a)(?(x)b|c)", "(?i)LAYER", ".*", r"\d+", "^(?!.*norm).*", "(" * 200 + ")" * 200, "a" * 5000,
    "(?<=a)b", "[", "\\", "(?<=(a|a)(a|a)(a|a))b",
)  # fmt: skip


def layer_rules(folder: Path) -> Attempt:
    path = folder / "rules.json"
    document = {
        "layer_patterns": {r"layers\.0\.": {"format": "int8", "block_size": 64}, "head": {"skip": True}}
    }
    names = ("a" * 40 + "b", "a" * 1000 + "!", "model.layers.0.mlp.up_proj.weight", "")

    def attempt(rng: random.Random) -> None:
        if rng.random() < 0.5:
            patterns = {rng.choice(_EXPRESSIONS): {"format": "fp16"} for _ in range(2)}
            path.write_text(json.dumps({"layer_patterns": patterns}))
        else:
            path.write_bytes(damaged_json(document, rng))
        rules = LayerConfig.from_mapping(load_layer_config(path))
        for name in names:
            rules.rule_for(name)
            rules.rule_for(name, fullmatch=True)

    return attempt


def lora(folder: Path) -> Attempt:
    root = folder / "adapter"
    root.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(2)
    layer = "base_model.model.blocks.0.attn.to_q"
    tensors = {
        f"{layer}.lora_A.weight": torch.randn(4, 8, generator=generator),
        f"{layer}.lora_B.weight": torch.randn(8, 4, generator=generator),
        "lora_unet_x.lora_down.weight": torch.randn(4, 8, generator=generator),
        "lora_unet_x.lora_up.weight": torch.randn(8, 4, generator=generator),
        "lora_unet_x.alpha": torch.tensor(2.0),
    }
    numbered = {f"unet:{i}:{half}": torch.ones(4, 4) for i in range(3) for half in ("down", "up")}
    raws = [save(tensors, {"ss_network_alpha": "4"}), save(numbered)]
    config = {
        "lora_alpha": 8,
        "alpha_pattern": {"to_q": 4, "to_k": 2},
        "use_rslora": True,
        "fan_in_fan_out": False,
    }
    flat = save({"a.lora_down.weight": torch.ones(4), "a.lora_up.weight": torch.ones(4)})

    def attempt(rng: random.Random) -> None:
        kind = rng.random()
        raw = rng.choice(raws)
        header, data = split_frame(raw)
        if kind < 0.3:
            whole = framed(damaged_json(header, rng), data)
        elif kind < 0.5:
            whole = damaged_bytes(raw, rng, [flat])
        else:
            whole = flat if kind < 0.52 else raw
        (root / "adapter_model.safetensors").write_bytes(whole)
        changed = (
            dict(config) if rng.random() < 0.5 else config | {"alpha_pattern": {rng.choice(_EXPRESSIONS): 3}}
        )
        (root / "adapter_config.json").write_bytes(
            damaged_json(changed, rng) if kind > 0.6 else json.dumps(changed).encode()
        )
        load_lora_for_merging(root)
        source = LoraSource(root, 1.0)
        plan_merges(
            [source],
            {"blocks.0.attn.to_q.weight": (8, 8), "x.weight": (8, 8)},
            dampen=True,
            allow_unmatched=True,
        )

    return attempt


def importance_matrix(folder: Path) -> Attempt:
    path = folder / "imatrix.gguf"
    entries = {
        f"blk.{i}.ffn_up.weight": ImatrixEntry(np.full((1, 8), 2.0, np.float32), np.full(1, 3.0, np.float32))
        for i in range(2)
    }
    write_imatrix(ImportanceMatrix(entries, ("a",), 2, 512), path)
    new = path.read_bytes()
    name = b"blk.0.ffn_up.weight"
    old = (
        struct.pack("<ii", 1, len(name))
        + name
        + struct.pack("<ii8f", 2, 8, *range(8))
        + struct.pack("<ii", 3, 1)
        + b"a"
    )
    floats = [struct.pack("<f", value) for value in (-1.0, float("inf"), float("nan"), -0.0, 3e38)]

    def attempt(rng: random.Random) -> None:
        raw = rng.choice((new, old))
        if rng.random() < 0.3:
            # Into the numbers themselves.
            place = (
                len(raw) - 9 - 4 * rng.randrange(1, 9) if raw is old else len(raw) - 4 * rng.randrange(1, 16)
            )
            raw = raw[:place] + rng.choice(floats) + raw[place + 4 :]
        path.write_bytes(raw if rng.random() < 0.3 else damaged_bytes(raw, rng, [new]))
        for values in read_imatrix(path).weights().values():
            assert np.isfinite(values).all()
            assert (values >= 0).all()

    return attempt


def statistics(folder: Path) -> Attempt:
    path = folder / "statistics.safetensors"
    entry = StatisticsEntry(("blocks.0.q", "blocks.0.k"), 4, 100)
    numbers = InputStatistics(torch.eye(4), torch.zeros(4), torch.ones(4), 100)
    write_statistics(path, [(entry, numbers)], [entry])
    raw = path.read_bytes()
    header, data = split_frame(raw)
    described = json.loads(header["__metadata__"]["qwodel_statistics"])

    def attempt(rng: random.Random) -> None:
        kind = rng.random()
        if kind < 0.4:
            changed = {
                **header,
                "__metadata__": {
                    "qwodel_statistics": damaged_json(described, rng).decode("utf-8", "replace")
                },
            }
            whole = framed(json.dumps(changed).encode(), data)
        else:
            whole = framed(damaged_json(header, rng), data) if kind < 0.7 else damaged_bytes(raw, rng)
        path.write_bytes(whole)
        file = StatisticsFile(path)
        with file:
            for layer in file.layers:
                file.read(layer)

    return attempt


def activation_scales(folder: Path) -> Attempt:
    scales = {"model.layers.0.q_proj": torch.rand(8), "model.layers.0.k_proj": torch.rand(8)}
    buffer = io.BytesIO()
    torch.save(scales, buffer)
    pickled, tensors = buffer.getvalue(), save(scales)
    header, data = split_frame(tensors)
    odd = (
        torch.full((8,), float("nan")), torch.full((8,), float("inf")), -torch.ones(8), torch.ones(2, 4), 3, "x",
        torch.empty(0), torch.ones(8, dtype=torch.complex64), torch.ones(8, dtype=torch.bool), torch.ones(8).to_sparse(),
        torch.ones(8).to(torch.float8_e4m3fn), torch.ones((), device="cpu"), {"a": torch.ones(8)},
    )  # fmt: skip

    def attempt(rng: random.Random) -> None:
        kind = rng.random()
        path = folder / ("scales.pt" if kind < 0.7 else "scales.safetensors")
        if kind < 0.3:
            torch.save({**scales, "odd": rng.choice(odd)}, path)
        elif kind < 0.5:
            path.write_bytes(damaged_bytes(pickled, rng, [tensors]))
        elif kind < 0.7:
            stream = pickle_bomb(rng)
            path.write_bytes(rezipped(pickled, {"/data.pkl": stream}))
        else:
            path.write_bytes(
                framed(damaged_json(header, rng), data) if kind < 0.9 else damaged_bytes(tensors, rng)
            )
        for values in load_activation_scales(path).values():
            assert values.isfinite().all()
            assert (values >= 0).all()

    return attempt


def calibration_data(folder: Path) -> Attempt:
    import pyarrow
    from pyarrow import parquet

    records: list[dict[str, Any]] = [
        {"text": "once upon a time"},
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
            ]
        },
        {"conversations": [{"from": "human", "value": "hello"}]},
    ]
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["a b c", "d"], "n": [1, 2]}), buffer)
    columns = buffer.getvalue()
    odd = (
        pyarrow.table({"text": [1, 2]}), pyarrow.table({"text": [None, "a"]}), pyarrow.table({"other": ["a"]}),
        pyarrow.table({"text": [[1], [2]]}), pyarrow.table({"messages": [[{"role": "user", "content": None}]]}),
    )  # fmt: skip

    def attempt(rng: random.Random) -> None:
        suffix = rng.choice((".json", ".jsonl", ".jsonl", ".parquet", ".txt"))
        path = folder / f"set{suffix}"
        if suffix == ".json":
            raw = damaged_json(records, rng)
        elif suffix == ".jsonl":
            raw = b"\n".join(damaged_json(record, rng) for record in records)
        elif suffix == ".parquet" and rng.random() < 0.3:
            parquet.write_table(rng.choice(odd), path)
            raw = path.read_bytes()
        else:
            raw = damaged_bytes(
                columns if suffix == ".parquet" else "Märchen ".encode() * 20, rng, [b"\xff\xfe\0"]
            )
        path.write_bytes(raw)
        for _ in load_documents(path):
            pass

    return attempt


def damaged_set(source: Path, target: Path, rng: random.Random) -> None:
    """Copy a calibration set and damage its description or a chunk, sometimes with the digest made to fit."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    meta = json.loads((target / "meta.json").read_text())
    if rng.random() < 0.6:
        (target / "meta.json").write_bytes(damaged_json(meta, rng))
        return
    chunk = rng.choice(sorted(target.glob("chunk_*")))
    raw = chunk.read_bytes()
    if rng.random() < 0.3:
        plain = zstandard.decompress(raw) if chunk.suffix == ".zst" else raw
        bomb = rezipped(plain, {"/data.pkl": pickle_bomb(rng)})
        raw = zstandard.compress(bomb) if chunk.suffix == ".zst" else bomb
    else:
        raw = damaged_bytes(raw, rng)
    chunk.write_bytes(raw)
    if rng.random() < 0.8:
        meta["sha256"][int(chunk.name[6:9])] = hashlib.sha256(raw).hexdigest()
        (target / "meta.json").write_text(json.dumps(meta))
