"""Activation scales against hooks of our own, from every kind of data, and their files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from qwodel.exceptions import CalibrationError, ConfigurationError, ValidationError
from qwodel.smoothquant import compute_activation_scales, load_activation_scales, save_activation_scales
from tests.modeling.test_wiring import tiny

IDS = torch.randint(3, 61, (6, 10), generator=torch.Generator().manual_seed(0))


def by_hand(model: Any, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the published tool computes: a hook on every linear layer."""
    found: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            peak = args[0].detach().abs().reshape(-1, args[0].shape[-1]).max(dim=0).values.float()
            found[name] = torch.max(found[name], peak) if name in found else peak

        return hook

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    for hook in hooks:
        hook.remove()
    return found


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(expected) and all(
        torch.allclose(found[name], expected[name], rtol=1e-5) for name in expected
    )


@pytest.mark.parametrize("form", ["tensor", "mapping", "tuple", "rows"])
def test_they_are_running_maxima_of_every_linear_layer(form: str) -> None:
    model = tiny("opt")
    data: list[Any] = {
        "tensor": [IDS[:3], IDS[3:]],
        "mapping": [{"input_ids": part, "labels": part} for part in (IDS[:3], IDS[3:])],
        "tuple": [(IDS[:3],), (IDS[3:],)],
        "rows": list(IDS),
    }[form]
    found = compute_activation_scales(model, data)
    assert same(found, by_hand(model, [IDS]))
    assert "lm_head" in found
    assert all(value.dtype == torch.float32 and value.ndim == 1 for value in found.values())


def test_a_data_loader_and_the_number_of_samples() -> None:
    model = tiny("llama")
    loader = DataLoader([{"input_ids": row} for row in IDS], batch_size=4)
    assert same(compute_activation_scales(model, loader, num_samples=5), by_hand(model, [IDS[:5]]))
    with pytest.raises(ConfigurationError, match="num_samples"):
        compute_activation_scales(model, loader, num_samples=0)
    with pytest.raises(CalibrationError, match="no calibration samples"):
        compute_activation_scales(model, [])
    with pytest.raises(CalibrationError, match="no input_ids"):
        compute_activation_scales(model, [{"pixels": IDS}])


def test_padding_does_not_count() -> None:
    model = tiny("llama")
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[1, 6:] = 0
    padded = compute_activation_scales(model, [{"input_ids": IDS[:2], "attention_mask": mask}])
    assert same(padded, by_hand(model, [IDS[:1], IDS[1:2, :6]]))
    assert not same(padded, by_hand(model, [IDS[:2]]))


def test_texts_are_tokenized_by_the_models_own_tokenizer(llama: Path, text: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    texts = text.read_text().split("\n\n")[:4]
    expected = by_hand(model, [tokenizer(each, return_tensors="pt").input_ids[:, :16] for each in texts])
    assert same(compute_activation_scales(model, texts, seq_len=16), expected)
    batched = compute_activation_scales(model, [texts[:2], texts[2:]], tokenizer=tokenizer, seq_len=16)
    assert same(batched, expected)
    model.config._name_or_path = ""
    with pytest.raises(ConfigurationError, match="tokenizer"):
        compute_activation_scales(model, texts)


def test_routers_experts_and_transposed_layers_are_there() -> None:
    mixture = compute_activation_scales(tiny("mixtral"), [IDS])
    assert {"model.layers.0.mlp.gate", "model.layers.0.mlp.experts.gate_up_proj"} <= set(mixture)
    assert "transformer.h.0.attn.c_attn" in compute_activation_scales(tiny("gpt2"), [IDS])


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_files_come_back_as_they_were(tmp_path: Path, ending: str) -> None:
    scales = compute_activation_scales(tiny("opt"), [IDS])
    path = save_activation_scales(scales, tmp_path / f"scales.{ending}")
    found = load_activation_scales(path)
    assert all(torch.equal(found[name], scales[name]) for name in scales)
    assert set(found) == set(scales)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    if ending == "pt":  # as the published tools read it, and as they write it
        plain = torch.load(path, weights_only=True)
        assert type(plain) is dict
        torch.save(plain, tmp_path / "theirs.pt")
        assert same(load_activation_scales(tmp_path / "theirs.pt"), scales)


def test_a_file_of_something_else_is_refused_and_never_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    (tmp_path / "trap.pt").write_bytes(pickle.dumps({"layer": Trap()}))
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": torch.ones(2, 2)}, tmp_path / "matrix.pt")
    for name in ("trap.pt", "list.pt", "matrix.pt", "missing.pt"):
        with pytest.raises(ValidationError, match="activation scales"):
            load_activation_scales(tmp_path / name)
    assert not (tmp_path / "sprung").exists()
