"""The same source and recipe give the same package, byte for byte, in whatever process and on whatever day."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import coremltools as ct
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.backends.coreml.runs import GROUPED

RUN = """
import sys
from qwodel import quantize
quantize(sys.argv[1], sys.argv[2], "coreml", sys.argv[3], seq_length=32, input_shape=(1, 8), workers=int(sys.argv[4]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float16", "int8_linear", "int4"])
def test_two_runs_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    LlamaForCausalLM(LlamaConfig(**GROUPED)).save_pretrained(tmp_path / "model")
    outputs = []
    for seed, workers in (("1", "1"), ("2", "2")):
        out = tmp_path / seed
        command = [sys.executable, "-c", RUN, str(tmp_path / "model"), str(out), name, workers]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed})
        folder = out / f"model-{name}"
        outputs.append(json.loads((folder / "qwodel.manifest.json").read_text())["outputs"])
    assert outputs[0] == outputs[1]
    package = folder / "model.mlpackage"
    assert {Path(each).name for each in outputs[0]} >= {"Manifest.json", "model.mlmodel", "weight.bin"}
    loaded = ct.models.MLModel(str(package), skip_model_load=True)
    assert loaded.user_defined_metadata["qwodel.format"] == name
    assert not any("date" in key for key in loaded.user_defined_metadata)
    # Who may read one file of it may read all.
    assert len({path.stat().st_mode & 0o044 for path in package.rglob("*")}) == 1
