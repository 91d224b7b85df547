from __future__ import annotations

import functools
import hashlib
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qwodel.checkpoint.run.tensor_work as tensor_work
import qwodel.checkpoint.run.verify as verify_module
from qwodel.checkpoint.files.slabs import row_slabs
from qwodel.checkpoint.formats.registry import storage_format
from qwodel.checkpoint.layouts.transformers import TransformersLayout
from qwodel.checkpoint.plan.recipe import LayerOverride
from qwodel.checkpoint.rounding.methods import ScaleSearch
from qwodel.exceptions import ValidationError
from tests.checkpoint.checkpoints import FORMATS, llama_weights, random_weights, run, save_sharded, sqnr


def expand(scale: torch.Tensor, shape: torch.Size, size: int) -> torch.Tensor:
    """A scale of any granularity as one factor for every weight; written apart from the library's own."""
    if scale.ndim == 0 or (scale.shape[1] == 1 and scale.shape[0] == shape[0]):
        return scale
    rows = torch.arange(shape[0]) // size
    cols = torch.arange(shape[1]) // size
    return scale[rows][:, cols]


def quip_matrix(signs: torch.Tensor) -> torch.Tensor:
    """QuIP's rotation as a matrix: Sylvester's Hadamard ⊗ Hartley's of the odd rest, after the signs."""
    size = len(signs)
    power = size & -size
    odd = size // power
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < power:
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
    angle = torch.outer(torch.arange(odd), torch.arange(odd)).double() * (2 * torch.pi / odd)
    matrix = torch.kron(sylvester, angle.cos() + angle.sin()) / size**0.5
    return matrix * signs.double()


def unrotate(rows: torch.Tensor, description: torch.Tensor) -> torch.Tensor:
    """Undo the ConvRot rotation that a layer's description names; its H is symmetric and orthogonal."""
    size = json.loads(bytes(description.tolist())).get("convrot_groupsize")
    if not size:
        return rows
    four = torch.ones(4, 4, dtype=torch.float64) - 2 * torch.eye(4, dtype=torch.float64).flip(0)
    rotation = torch.ones(1, 1, dtype=torch.float64)
    while rotation.shape[0] < size:
        rotation = torch.kron(rotation, four) / 2
    return (rows.double().reshape(rows.shape[0], -1, size) @ rotation).reshape(rows.shape)


values = st.one_of(
    st.just(0.0),
    st.floats(-1, 1, width=32),
    st.floats(-(2.0**-126), 2.0**-126, allow_subnormal=True),
    st.sampled_from([448.0, -3e4, 6e4, 1.0, -1.0]),
)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 41), st.integers(1, 41)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    name=st.sampled_from(FORMATS),
    size=st.sampled_from([4, 7, 16]),
    pool=st.lists(values, min_size=1, max_size=12),
    search=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_weight_decodes_to_what_is_reported(
    shape: tuple[int, int],
    dtype: torch.dtype,
    name: str,
    size: int,
    pool: list[float],
    search: bool,
    seed: int,
) -> None:
    picks = torch.randint(len(pool), shape, generator=torch.Generator().manual_seed(seed))
    weight = torch.tensor(pool, dtype=torch.float64)[picks].to(dtype)
    wanted = storage_format(name)
    recipe: dict[str, Any] = {"format": name, "block_size": size if wanted.granularity.is_block else None}
    if search:
        recipe["rounding"] = ScaleSearch()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.safetensors", Path(folder) / "out.safetensors"
        save_file({"blocks.0.proj.weight": weight}, source)
        _, quality = run(source, target, **recipe)
        out = load_file(target)
    codes, scale = out["blocks.0.proj.weight"], out["blocks.0.proj.weight_scale"]
    assert codes.shape == weight.shape
    assert scale.dtype == torch.float32
    stored = (codes.float() * expand(scale, codes.shape, size)).double()
    if not wanted.mixes_rows:
        decoded = unrotate(stored, out["blocks.0.proj.comfy_quant"])
    else:
        outputs, inputs = (quip_matrix(out[f"blocks.0.proj.quip_signs_{side}"]) for side in ("out", "in"))
        decoded = outputs.T @ stored @ inputs
    found = quality["blocks.0.proj.weight"]
    error = (decoded - weight.double()).square()
    power = float(weight.double().square().mean())
    assert float(error.mean()) == pytest.approx(found.mse, rel=1e-3, abs=power * 1e-13 + 1e-80)
    reported = found.sqnr_db
    if reported < 120 and power > 1e-70:
        assert sqnr(weight, decoded) == pytest.approx(reported, abs=0.05)
    if not search and not wanted.rotates:
        peak = weight.double().abs().max()
        # A step is at most 1/127 of the peak for INT8 and an eighth (E5M2: a quarter) of the value for FP8.
        assert float(error.max()) <= float(peak / (8 if name.startswith("fp8") else 250)) ** 2 * 1.001 + 1e-70


@pytest.mark.parametrize("name", ["fp8_e4m3", "int8_row"])
def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, name: str) -> None:
    save_sharded(tmp_path / "in", llama_weights(3), 2)
    (tmp_path / "in" / "config.json").write_text("{}")
    digests = set()
    for workers in (1, 2, 4):
        out = tmp_path / f"out{workers}"
        run(
            tmp_path / "in",
            out,
            TransformersLayout(),
            workers,
            format=name,
            max_shard_size=20_000,
            rounding=ScaleSearch(),
        )
        files = sorted(out.glob("*"))
        assert len(files) > 3
        digests.add(tuple((file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files))
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["int8_row", "fp8_e4m3", "int8_block", "fp16"])
def test_the_plan_knows_the_exact_size(tmp_path: Path, name: str) -> None:
    save_sharded(tmp_path / "in", llama_weights(2), 2)
    (tmp_path / "in" / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    conversion, _ = run(
        tmp_path / "in", tmp_path / "out", TransformersLayout("none"), format=name, max_shard_size=30_000
    )
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*"))
    assert written == conversion.plan.output_bytes
    table = conversion.plan.table()
    assert all(each.name in table for each in conversion.plan.tensors)
    assert f"{written:,} bytes" in table


def test_slabs_of_a_large_weight_equal_the_whole(tmp_path: Path) -> None:
    from qwodel.algorithms.quant_types import INT8, ROW, TENSOR, Granularity
    from qwodel.algorithms.scales import quantize_matrix

    weight = random_weights({"w": (3001, 1500)}, torch.float32)["w"]
    weight[:1500] = 0  # the first slab has nothing to say of the scale
    weight[2999, 7] = 3.0
    save_file({"a.weight": weight}, tmp_path / "in.safetensors")
    for name, granularity in (
        ("int8_tensor", TENSOR),
        ("int8_row", ROW),
        ("int8_block", Granularity.block(128)),
    ):
        run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", format=name)
        out, whole = load_file(tmp_path / "out.safetensors"), quantize_matrix(weight, INT8, granularity)
        assert torch.equal(out["a.weight"], whole.codes)
        assert torch.equal(out["a.weight_scale"], whole.scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rounding", [None, ScaleSearch()])
def test_nonfinite_weights_are_named_or_kept(tmp_path: Path, bad: float, rounding: Any) -> None:
    weights = llama_weights(2)
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = bad
    save_file(weights, tmp_path / "in.safetensors")
    extra = {"rounding": rounding} if rounding else {}
    with pytest.raises(ValidationError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", **extra)
    run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", nonfinite="keep", **extra)
    out = load_file(tmp_path / "out.safetensors")
    kept = out["model.layers.1.mlp.down_proj.weight"]
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept.isfinite(), weights["model.layers.1.mlp.down_proj.weight"].isfinite())
    assert out["model.layers.0.mlp.down_proj.weight"].dtype == torch.int8


def test_what_is_not_quantized_is_copied_bit_for_bit(tmp_path: Path) -> None:
    weights = llama_weights(1) | {
        "model.layers.0.self_attn.q_proj.bias": torch.randn(64),
        "steps": torch.arange(5),
        "flag": torch.tensor(True),
        "empty.weight": torch.empty(0, 8),
        "conv.weight": torch.randn(4, 3, 3, 3),
        "odd": torch.randn(3, dtype=torch.float64),
    }
    save_file(weights, tmp_path / "in.safetensors", {"author": "somebody"})
    conversion, quality = run(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    for name, weight in weights.items():
        if name not in quality:
            assert out[name].dtype == weight.dtype
            assert torch.equal(out[name], weight)
    assert {each.name for each in conversion.plan.tensors} == set(weights)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"author": "somebody"}


def test_casting_to_fp16_refuses_what_does_not_fit(tmp_path: Path) -> None:
    save_file({"a.weight": torch.full((2, 2), 1e6)}, tmp_path / "in.safetensors")
    with pytest.raises(ValidationError, match=r"a\.weight"):
        run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", format="fp16")


def test_casting_to_fp16(tmp_path: Path) -> None:
    weights = llama_weights(1, torch.float32) | {"t": torch.tensor(0.5), "n": torch.arange(3)}
    save_file(weights, tmp_path / "in.safetensors")
    run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", format="fp16")
    out = load_file(tmp_path / "out.safetensors")
    for name, weight in weights.items():
        assert torch.equal(out[name], weight.half() if weight.is_floating_point() else weight)


def test_files_keep_wide_dtypes_aligned(tmp_path: Path) -> None:
    save_file(llama_weights(1), tmp_path / "in.safetensors")
    conversion, _ = run(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    (file,) = conversion.plan.files
    for each in conversion.plan.tensors:
        for tensor in each.outputs:
            itemsize = {"F32": 4, "BF16": 2}.get(tensor.dtype, 1)
            assert file.offsets[tensor.name] % itemsize == 0


@pytest.mark.parametrize("name", ["int8_row", "fp8_e4m3", "int8_block", "fp16"])
def test_empty_and_scalar_tensors_come_through(tmp_path: Path, name: str) -> None:
    """Also where a rule names them."""
    weights = {
        "blocks.0.proj.weight": torch.randn(8, 8),
        "blocks.0.rows.weight": torch.empty(0, 8),
        "blocks.0.cols.weight": torch.empty(8, 0),
        "blocks.0.none": torch.empty(0),
        "blocks.0.gain.weight": torch.tensor(0.5),
        "steps": torch.tensor(7),
    }
    save_file(weights, tmp_path / "in.safetensors")
    rule = LayerOverride("blocks", storage_format(name))
    conversion, quality = run(
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", format=name, custom_layers=rule
    )
    out = load_file(tmp_path / "out.safetensors")
    assert list(quality) == ([] if name == "fp16" else ["blocks.0.proj.weight"])
    for key, weight in weights.items():
        assert out[key].shape == weight.shape
        if key not in quality:
            assert torch.equal(out[key].double(), weight.to(out[key].dtype).double())
    reasons = {each.name: each.reason for each in conversion.plan.tensors}
    if name != "fp16":
        assert reasons["blocks.0.rows.weight"] == reasons["blocks.0.cols.weight"] == "empty"
        assert "not a matrix" in reasons["blocks.0.gain.weight"]


@pytest.mark.parametrize("name", FORMATS)
def test_many_slabs_decode_and_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A weight of dozens of slabs has the bytes it has in one."""
    source = tmp_path / "in.safetensors"
    save_file(random_weights({"blocks.0.proj.weight": (517, 70), "blocks.0.bias": (999,)}), source)
    size = 16 if storage_format(name).granularity.is_block else None
    run(source, tmp_path / "whole.safetensors", format=name, block_size=size)
    small = functools.partial(row_slabs, elements=1200)
    monkeypatch.setattr(verify_module, "row_slabs", lambda shape, multiple=1, _=0: small(shape, multiple))
    monkeypatch.setattr(tensor_work, "CACHED_ELEMENTS", 1200)
    monkeypatch.setattr(tensor_work, "_COPY_BYTES", 100)
    _, quality = run(source, tmp_path / "slabs.safetensors", format=name, block_size=size)
    assert list(quality) == ["blocks.0.proj.weight"]
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "slabs.safetensors").read_bytes()
