"""How often one run parses what it reads: its source once, and its output once more, to verify it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwodel.model_config as model_config
from qwodel import Quantizer
from qwodel.checkpoint.formats.stated import StoredTensors
from qwodel.checkpoint.source.checkpoint import Checkpoint
from qwodel.checkpoint.source.weights import read_weights
from qwodel.safetensors_files import SafetensorsHeader
from tests.smoothquant.conftest import SIZES, llama, one_thread, text

__all__ = ["llama", "one_thread", "text"]  # fixtures


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often sources are resolved, headers parsed and ``config.json`` parsed, in all threads of this process."""
    found: Counter[str] = Counter()

    def count(owner: Any, name: str, what: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            found[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(StoredTensors, "__init__", "resolved")
    count(SafetensorsHeader, "__init__", "headers")
    count(model_config, "read_json_object", "configs")
    return found


# The source, and the output that is verified: two of everything.
# SmoothQuant's weights come from the smoothed checkpoint, which has a header of its own; and its result
# is loaded by the public reader too, which must find everything out by itself.
BOUNDS = {
    "int8": {"resolved": 2, "headers": 2, "configs": 2},
    "int8 with text": {"resolved": 2, "headers": 2, "configs": 2},
    "smoothquant": {"resolved": 2, "headers": 4, "configs": 3},
    "smoothquant with gptq": {"resolved": 2, "headers": 4, "configs": 3},
}


@pytest.mark.parametrize("run", BOUNDS)
def test_a_run_parses_its_source_and_its_output_once(
    run: str, counts: Counter[str], llama: Path, text: Path, tmp_path: Path
) -> None:
    backend, _, _ = run.partition(" ")
    options: dict[str, Any] = {} if run == "int8" else {"calibration_dataset": str(text), **SIZES}
    if "gptq" in run:
        options["optimizer"] = "gptq"
    Quantizer(backend, llama, tmp_path, **options).quantize(
        "int8_row" if backend == "int8" else "w8a8_dynamic"
    )
    over = {what: counts[what] for what, most in BOUNDS[run].items() if not 0 < counts[what] <= most}
    assert not over


def test_what_travels_to_worker_processes_is_not_parsed_there(counts: Counter[str], llama: Path) -> None:
    checkpoint = Checkpoint.of(llama)
    before = counts.copy()
    received: Checkpoint = pickle.loads(pickle.dumps(checkpoint))
    with received.open() as there, checkpoint.open() as here:
        for source in received.sources.tensors:
            rows = source.row_decoder.rows(there, 0, source.shape[0])
            assert torch.equal(rows, source.row_decoder.rows(here, 0, source.shape[0]))
    assert counts == before


def test_a_model_that_changes_before_the_run_is_read_anew(
    counts: Counter[str], llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    quantizer = Quantizer("int8", folder, tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights["an.extra.tensor"] = torch.zeros(3)  # every place in the file moves
    weights[name] = torch.flip(weights[name], (0,))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"note": "changed"}))
    path = quantizer.quantize("int8_row", layout="transformers")
    assert counts["headers"] == 3
    decoded = dict(read_weights(path))
    assert torch.allclose(decoded[name], weights[name], atol=float(weights[name].abs().max()) / 100)
    assert json.loads((path / "config.json").read_text())["note"] == "changed"
