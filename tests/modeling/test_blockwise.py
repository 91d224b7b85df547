from __future__ import annotations

import itertools

import pytest
import torch
from safetensors import safe_open

from qwodel.algorithms.data_aware import DataAware
from qwodel.algorithms.gptq import gptq
from qwodel.algorithms.hadamard import convrot_gram, convrot_weight
from qwodel.algorithms.quant_types import INT8, ROW
from qwodel.algorithms.scales import quantize_matrix
from qwodel.checkpoint.formats.registry import storage_format
from qwodel.checkpoint.rounding.code_store import CodeStore
from qwodel.exceptions import Cancelled, ConversionError, QuantizationError
from qwodel.modeling.blockwise import quantize_blockwise, round_stored
from qwodel.modeling.lazy_model import config_of, open_lazily
from qwodel.modeling.model_blocks import layer_name
from qwodel.progress import Progress

from .test_observe import plain_inputs
from .tiny_models import batches, save


def solve(weights, task, statistics):
    return round_stored(weights, task, statistics, DataAware())


def of_a_linear_layer(key):
    return not any(word in key for word in ("norm", "Norm", "embed", "shared", "bias", "lm_head"))


def run(folder, name, task, *, keep=of_a_linear_layer, progress=None, method="gptq", watch=None, count=3):
    """Quantize a saved model; ``watch`` is given the lazy model and the statistics of each solution."""
    file = safe_open(folder / "model.safetensors", "pt")
    lazy = open_lazily(config_of(folder), file.keys(), file.get_tensor)
    tasks = {
        layer_name(key): task
        for key in list(file.keys())
        if len(file.get_slice(key).get_shape()) == 2 and keep(key)
    }

    def watched(weights, task, statistics):
        if watch:
            watch(lazy, statistics)
        return round_stored(weights, task, statistics, DataAware(method))

    store = folder / f"store{len(list(folder.iterdir()))}"
    store.mkdir()
    data = [batch | {"use_cache": False} for batch in batches(name, count)]
    progress, asymmetric = progress or Progress(None), method == "gptaq"
    reports = quantize_blockwise(
        lazy, tasks, data, watched, CodeStore(store), progress, asymmetric=asymmetric
    )
    return lazy, CodeStore(store), reports, tasks


def weights_of(folder):
    file = safe_open(folder / "model.safetensors", "pt")
    return {key: file.get_tensor(key) for key in list(file.keys())}


@pytest.mark.parametrize("convrot", [False, True])
def test_codes_are_those_of_a_hand_made_sequence(tmp_path, convrot):
    """Quantize a plain model by hand: what a layer reads comes from the quantized layers before it."""
    model = save("llama", tmp_path)
    _, store, reports, tasks = run(
        tmp_path,
        "llama",
        storage_format("int8_convrot" if convrot else "int8_row"),
        keep=lambda key: "_proj" in key,
    )
    assert len(tasks) == len(reports) == 21
    modules = dict(model.named_modules())
    stages = ("self_attn.q self_attn.k self_attn.v", "self_attn.o", "mlp.gate mlp.up", "mlp.down")
    for block, stage in itertools.product(range(3), stages):
        layers = {
            name: modules[name] for name in (f"model.layers.{block}.{part}_proj" for part in stage.split())
        }
        seen = plain_inputs(model, batches("llama"))
        for name, module in layers.items():
            gram, weight = seen[name].T @ seen[name], module.weight.detach()
            if convrot:
                gram, weight = convrot_gram(gram, 16), convrot_weight(weight, 16)
            expected = gptq(weight, INT8, ROW, gram)
            differing = (store.get(name).codes != expected.quantized.codes).float().mean()
            assert differing < 0.01, name  # sums in another order turn a code here and there
            assert torch.allclose(store.get(name).scale, expected.quantized.scale)
            signal, loss = expected.signal.sum(), expected.loss.sum()
            assert reports[name].output_sqnr_db == pytest.approx(
                10 * float(torch.log10(signal / loss)), abs=0.05
            )
            assert reports[name].output_sqnr_db > reports[name].nearest_sqnr_db
        for name, module in layers.items():
            done = store.get(name).dequantize()
            module.weight.data = convrot_weight(done, 16) if convrot else done


@pytest.mark.parametrize("name", ["bert", "t5", "opt", "gpt-neox", "phi3", "gemma2", "albert", "mixtral"])
def test_every_layer_of_other_architectures_gains(name, tmp_path):
    save(name, tmp_path)
    _, store, reports, tasks = run(tmp_path, name, storage_format("fp8_e4m3"))
    assert reports.keys() == tasks.keys()
    solved = {layer: report for layer, report in reports.items() if report.method == "gptq"}
    # The relative position table of T5 is no linear layer's weight.
    assert len(solved) > 0.7 * len(tasks)
    for layer, report in solved.items():
        assert report.output_sqnr_db >= report.nearest_sqnr_db, layer
        assert store.get(layer).codes.dtype == torch.float8_e4m3fn


def test_experts_have_codes_of_their_own(tmp_path):
    save("mixtral", tmp_path)
    _, store, reports, _ = run(
        tmp_path, "mixtral", storage_format("int8_row"), keep=lambda key: ".experts." in key
    )
    source = weights_of(tmp_path)
    counts = {}
    for layer, report in reports.items():
        weight = source[f"{layer}.weight"]
        error = (store.get(layer).dequantize() - weight).norm() / weight.norm()
        assert error < 0.02, layer
        counts.setdefault(layer.rsplit(".", 1)[0], set()).add(report.tokens)
    assert all(len(tokens) == 1 for tokens in counts.values()), "w1, w2 and w3 of an expert see its tokens"
    assert len({next(iter(tokens)) for tokens in counts.values()}) > 1


def test_only_one_block_is_ever_loaded(tmp_path):
    save("llama", tmp_path)
    file = safe_open(tmp_path / "model.safetensors", "pt")
    lazy = open_lazily(config_of(tmp_path), file.keys(), file.get_tensor)
    most = 0

    def watch(weights, task, statistics):
        nonlocal most
        loaded = {
            n.split(".")[2]
            for n, p in lazy.model.model.layers.named_parameters(prefix="model.layers")
            if p.device.type != "meta"
        }
        most = max(most, len(loaded))
        return solve(weights, task, statistics)

    (tmp_path / "store").mkdir()
    tasks = {layer_name(key): storage_format("int8_row") for key in list(file.keys()) if "_proj" in key}
    quantize_blockwise(lazy, tasks, batches("llama"), watch, CodeStore(tmp_path / "store"), Progress(None))
    assert most == 1


def test_starved_experts_are_rounded_to_nearest_and_listed(tmp_path):
    save("mixtral", tmp_path)
    file = safe_open(tmp_path / "model.safetensors", "pt")
    lazy = open_lazily(config_of(tmp_path), file.keys(), file.get_tensor)
    tasks = {layer_name(key): storage_format("int8_row") for key in list(file.keys()) if ".experts." in key}
    (tmp_path / "store").mkdir()
    store = CodeStore(tmp_path / "store")
    one = [{"input_ids": torch.tensor([[5]]), "use_cache": False}]
    reports = quantize_blockwise(lazy, tasks, one, solve, store, Progress(None))
    assert {report.method for report in reports.values()} == {"nearest"}
    unseen = [layer for layer, report in reports.items() if "saw no calibration data" in report.note]
    few = [layer for layer, report in reports.items() if "saw 1 tokens, too few for" in report.note]
    assert len(unseen) == len(few) == len(tasks) // 2  # two of four experts a token
    weight = weights_of(tmp_path)[f"{unseen[0]}.weight"]
    assert torch.equal(store.get(unseen[0]).codes, quantize_matrix(weight, INT8, ROW).codes)


def test_weights_that_belong_to_no_layer(tmp_path):
    save("llama", tmp_path)
    with pytest.raises(QuantizationError, match=r"belong to no layer.*stranger"):
        file = safe_open(tmp_path / "model.safetensors", "pt")
        lazy = open_lazily(config_of(tmp_path), file.keys(), file.get_tensor)
        (tmp_path / "store").mkdir()
        tasks = {
            "stranger": storage_format("int8_row"),
            "model.layers.0.self_attn.q_proj": storage_format("int8_row"),
        }
        quantize_blockwise(
            lazy, tasks, batches("llama"), solve, CodeStore(tmp_path / "store"), Progress(None)
        )


def test_cancelling_ends_the_run(tmp_path):
    save("llama", tmp_path)

    def stop(percent, stage, message):
        if percent > 30:
            raise RuntimeError("enough")

    with pytest.raises(Cancelled):
        run(tmp_path, "llama", storage_format("int8_row"), progress=Progress(stop, {"calibrate": 1.0}))


def test_codes_that_were_not_kept(tmp_path):
    (tmp_path / "index.json").write_text('{"other": "x"}')
    with pytest.raises(ConversionError, match="no codes"):
        CodeStore(tmp_path).get("layer")
