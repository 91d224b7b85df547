"""Entry points of SegQuant: saved models, calibration sets and affiners."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save, save_file

from qwodel.segquant import load_affiner, load_calibrate_set, load_quantized, quantize, save_quantized
from qwodel.segquant.calibration_files import Meta, write_chunk, write_meta
from tests.hostile.mutations import damaged_bytes, damaged_json, framed, split_frame
from tests.hostile.side_files import damaged_set
from tests.hostile.weight_files import Attempt
from tests.segquant.toys import batches, toy

__all__ = ["affiner", "calibration_set", "saved_model"]

_KEY = "qwodel.segquant"


def saved_model(folder: Path) -> Attempt:
    settings = {
        "default": {"opt": {"type": "default"}, "conv": True, "real_quant": True},
        "*.down": {"weight_quant": {"symmetric": False}, "input_quant": {"symmetric": False}},
    }
    model = quantize(toy(), batches(1), settings)
    file = save_quantized(model, folder / "whole.safetensors")
    raw = file.read_bytes()
    header, data = split_frame(raw)
    structure = json.loads(header["__metadata__"][_KEY])
    root = save_quantized(model, folder / "directory")
    config = json.loads((root / "config.json").read_text())

    def attempt(rng: random.Random) -> None:
        kind = rng.random()
        if kind < 0.3:
            (root / "config.json").write_bytes(damaged_json(config, rng))
            load_quantized(root, toy())
            return
        if kind < 0.7:
            changed = {
                **header,
                "__metadata__": {_KEY: damaged_json(structure, rng).decode("utf-8", "replace")},
            }
            whole = framed(json.dumps(changed).encode(), data)
        else:
            whole = framed(damaged_json(header, rng), data) if kind < 0.9 else damaged_bytes(raw, rng)
        file.write_bytes(whole)
        load_quantized(file, toy())

    return attempt


def calibration_set(folder: Path) -> Attempt:
    sets = {}
    for compress in (True, False):
        source = folder / f"set{compress}"
        source.mkdir(exist_ok=True)
        meta = Meta({"sampler": "all"}, compress, 2, complete=True, inputs=["abc"], run=1)
        for _ in range(2):
            items = [{"args": (torch.ones(2, 4),), "kwargs": {"t": torch.ones(2), "flag": True}}] * 2
            write_chunk(source, meta, items)
        write_meta(source, meta)
        sets[compress] = source

    def attempt(rng: random.Random) -> None:
        compress = rng.random() < 0.5
        target = folder / "damaged"
        damaged_set(sets[compress], target, rng)
        found = load_calibrate_set(target, compress=compress)
        for _ in found or ():
            pass

    return attempt


def affiner(folder: Path) -> Attempt:
    path = folder / "affiner.safetensors"
    described = {
        "version": 1,
        "config": {"type": "blockwise", "config": {"max_timestep": 4, "solver_config": {}}, "extra_args": {}},
        "timesteps": [1.0, 5.0],
        "solved": [1.0, 5.0],
    }
    tensors = {f"{place}.{part}": torch.ones(4, 1, 1) for place in range(2) for part in ("gain", "bias")}
    save_file(tensors, path, {"qwodel_affiner": json.dumps(described)})
    load_affiner(path)
    raw = path.read_bytes()
    header, data = split_frame(raw)
    odd = [
        torch.full((4, 1, 1), float("nan")),
        torch.ones(()),
        torch.ones(3),
        torch.ones(4, 1, 1).to(torch.int8),
    ]

    def attempt(rng: random.Random) -> None:
        kind = rng.random()
        if kind < 0.5:
            text = damaged_json(described, rng).decode("utf-8", "replace")
            whole = framed(json.dumps({**header, "__metadata__": {"qwodel_affiner": text}}).encode(), data)
        elif kind < 0.6:
            whole = save({**tensors, "0.gain": rng.choice(odd)}, {"qwodel_affiner": json.dumps(described)})
        else:
            whole = framed(damaged_json(header, rng), data) if kind < 0.8 else damaged_bytes(raw, rng)
        path.write_bytes(whole)
        load_affiner(path)

    return attempt
