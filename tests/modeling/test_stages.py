from __future__ import annotations

import pytest
import torch

from qwodel.modeling.observe.layers import layers_to_record
from qwodel.modeling.stages import find_stages
from qwodel.modeling.stepwise import run_in_step

from .tiny_models import batches, make


def stages_of(name, wanted=lambda parameter: True):
    """Stages of every block of a model, as it is run on its first batch."""
    model, found = make(name), []
    units = list(model.get_decoder().layers)

    def visit(unit, arrivals):
        layers = layers_to_record(unit, {key for key, _ in unit.named_parameters() if wanted(key)})
        before = [each.clone() for each in arrivals[0].args]
        found.append(find_stages(unit, layers, arrivals[0]))
        assert all(torch.equal(a, b) for a, b in zip(before, arrivals[0].args, strict=True))
        for each in arrivals:
            yield unit(*each.args, **each.kwargs)

    with torch.no_grad():
        run_in_step(lambda batch: model(**batch), batches(name), units, visit)
    return found


def test_layers_that_read_the_same_tensor_are_one_stage():
    attention = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)]
    expected = (*attention, ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
    assert stages_of("llama") == [expected] * 3


def test_a_layer_that_reads_the_same_tensor_after_others_have_run_is_a_stage_of_its_own():
    attention = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.dense",)]
    assert stages_of("phi") == [(*attention, ("mlp.fc1",), ("mlp.fc2",))] * 3


@pytest.mark.parametrize("wanted", ["experts", ""])
def test_blocks_with_experts_have_no_stages(wanted):
    assert not any(stages_of("mixtral", lambda key: wanted in key))


def test_a_block_whose_layer_sees_part_of_the_tokens_has_no_stages():
    model = make("llama")
    block = model.model.layers[0]
    halves = torch.nn.Linear(block.self_attn.q_proj.in_features, 4)
    block.halves = halves
    block.register_forward_pre_hook(lambda module, args: (halves(args[0][:, :2]), None)[1])
    found = []

    def visit(unit, arrivals):
        layers = layers_to_record(unit, {key for key, _ in unit.named_parameters()})
        found.append(find_stages(unit, layers, arrivals[0]))
        for each in arrivals:
            yield unit(*each.args, **each.kwargs)

    run_in_step(lambda batch: model(**batch), batches("llama"), [block], visit)
    assert found == [None]
