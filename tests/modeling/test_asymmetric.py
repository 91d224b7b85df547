"""GPTAQ through whole models: two paths, the quantized and the unquantized one, side by side."""

from __future__ import annotations

import itertools
from copy import deepcopy

import pytest
import torch

from qwodel.algorithms.asymmetric import asymmetric_targets
from qwodel.algorithms.gptq import gptq
from qwodel.algorithms.gram import InputStatistics
from qwodel.algorithms.quant_types import FP8_E4M3, INT8, ROW, TENSOR
from qwodel.checkpoint.formats.registry import storage_format
from qwodel.modeling import model_blocks

from .test_blockwise import run as run_blockwise
from .test_observe import plain_inputs
from .tiny_models import batches, save


def run(folder, name, kind="fp8_e4m3", *, method="gptaq", watch=None, count=3):
    """Quantize a saved model; codes and reports by layer, and all statistics in order."""
    seen = []

    def look(lazy, statistics):
        seen.append(statistics)
        if watch:
            watch(lazy)

    _, store, reports, _ = run_blockwise(
        folder, name, storage_format(kind), method=method, watch=look, count=count
    )
    return store, reports, seen


def test_codes_are_those_of_a_hand_made_sequence(tmp_path):
    """Two plain models, one of them quantized stage by stage, give targets and Gram matrices."""
    source = save("llama", tmp_path)
    store, reports, _ = run(tmp_path, "llama", "int8_row")
    assert {each.method for each in reports.values()} == {"gptaq"}
    quantized = deepcopy(source)
    modules = dict(quantized.named_modules())
    wanted = plain_inputs(source, batches("llama"))
    moved = []
    stages = ("self_attn.q self_attn.k self_attn.v", "self_attn.o", "mlp.gate mlp.up", "mlp.down")
    for block, stage in itertools.product(range(3), stages):
        names = [f"model.layers.{block}.{part}_proj" for part in stage.split()]
        seen = plain_inputs(quantized, batches("llama"))
        for name in names:
            inputs, weight = seen[name], modules[name].weight.detach()
            drift = (wanted[name] - inputs).T @ inputs
            statistics = InputStatistics(
                inputs.T @ inputs, inputs.mean(0), inputs.abs().amax(0), len(inputs), drift
            )
            [target] = asymmetric_targets([weight], statistics)
            moved.append(float((target - weight).norm() / weight.norm()))
            expected = gptq(target, INT8, ROW, statistics.gram).quantized
            differing = (store.get(name).codes != expected.codes).float().mean()
            assert differing < 0.01, name  # sums in another order turn a code here and there
            assert torch.allclose(store.get(name).scale, expected.scale)
        for name in names:
            modules[name].weight.data = store.get(name).dequantize()
    assert moved[0] == 0, "the first layer reads the same in both"
    assert min(moved[3:]) > 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "gpt-neox", "phi", "bert", "t5", "mixtral"])
def test_the_unquantized_path_stays_unquantized(name, tmp_path):
    """Drift is that of a model of its own: what it says of each layer is what two models say."""
    source = save(name, tmp_path)
    store, reports, seen = run(tmp_path, name)
    assert {each.method for each in reports.values()} <= {"gptaq", "nearest"}
    known = [each for each in seen if each is not None]
    told = [each for each in known if each.drift is not None]
    # Experts see other tokens where routing has changed; q, k, v and o see all of them.
    assert len(told) == (6 if name == "mixtral" else len(known))
    quantized = deepcopy(source)
    state = quantized.state_dict()
    for layer in reports:
        if f"{layer}.weight" in state:
            state[f"{layer}.weight"].copy_(store.get(layer).dequantize())
    if name == "mixtral":
        return
    wanted, found = (plain_inputs(model, batches(name)) for model in (source, quantized))
    expected = [(wanted[n] - found[n]).T @ found[n] / len(found[n]) for n in wanted if n in found]
    for each in told:
        nearest = min(
            float((each.drift - other).norm() / other.norm().clamp_min(1e-9))
            for other in expected
            if other.shape == each.drift.shape
        )
        assert nearest < 0.02 or float(each.drift.norm()) < 1e-6


@pytest.mark.parametrize("name", ["llama", "opt", "gpt-neox", "phi", "mixtral", "qwen3-moe"])
def test_outputs_are_nearer_to_the_sources(name, tmp_path):
    source = save(name, tmp_path)
    data = batches(name, 12)
    error = {}
    for method in ("gptq", "gptaq"):
        store, reports, _ = run(tmp_path, name, method=method, count=12)
        model = deepcopy(source)
        state = model.state_dict()
        for layer in (each for each in reports if f"{each}.weight" in state):
            state[f"{layer}.weight"].copy_(store.get(layer).dequantize())
        with torch.no_grad():
            pairs = [(source(**batch).logits, model(**batch).logits) for batch in data]
        error[method] = sum(float((a - b).square().sum()) for a, b in pairs)
    assert error["gptaq"] < error["gptq"]


def test_a_block_that_runs_again_runs_quantized(tmp_path):
    """ALBERT's layers share their weights: the second one must see what the first has become."""
    save("albert", tmp_path)
    used = []

    def watch(lazy):
        if not used:
            layer = lazy.model.encoder.albert_layer_groups[0].albert_layers[0].attention.query
            layer.register_forward_hook(lambda module, args, output: used.append(module.weight.clone()))
            used.append(layer.weight.clone())

    store, reports, _ = run(tmp_path, "albert", method="gptq", watch=watch)
    [name] = [layer for layer in reports if layer.endswith("attention.query")]
    assert not torch.equal(used[0], used[-1])
    assert torch.equal(used[-1], store.get(name).dequantize())


@pytest.mark.parametrize("name", ["llama-tied", "t5", "bert", "opt"])
def test_large_embeddings_are_in_memory_only_while_they_are_used(name, tmp_path, monkeypatch):
    save(name, tmp_path)
    plain, reports, _ = run(tmp_path, name)
    monkeypatch.setattr(model_blocks, "_LARGE_EMBEDDING", 0)
    held = []

    def watch(lazy):
        held.append(not lazy.model.get_input_embeddings().weight.is_meta)

    store, _, _ = run(tmp_path, name, watch=watch)
    assert held
    assert not any(held)
    for layer in reports:
        assert torch.equal(
            store.get(layer).codes.view(torch.uint8), plain.get(layer).codes.view(torch.uint8)
        ), layer


def test_targets_of_whole_tensor_fp8(tmp_path):
    """The scale is chosen for what is rounded: the target, not the source weight."""
    source = save("llama", tmp_path)
    store, _, seen = run(tmp_path, "llama", "fp8_e4m3")
    name = "model.layers.2.mlp.down_proj"
    [target] = asymmetric_targets([dict(source.named_modules())[name].weight.detach()], seen[-1])
    expected = gptq(target, FP8_E4M3, TENSOR, seen[-1].gram).quantized
    assert torch.equal(store.get(name).codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(store.get(name).scale, expected.scale)
