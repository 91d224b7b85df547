"""A hub id goes in, a GGUF comes out; the hub is served on loopback through HF_ENDPOINT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwodel.gguf_header import read_gguf_header
from tests.hub_server import COMMIT, Hub, serve


def _run(hub: Hub, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    environment.pop("HF_TOKEN", None)
    command = [sys.executable, "-m", "qwodel", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)


@pytest.fixture
def published(stories15m: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in stories15m.iterdir()}


def test_a_hub_model_is_quantized_under_its_own_name(published: dict[str, bytes], tmp_path: Path) -> None:
    with serve() as hub:
        hub.repos["someone/Stories-15M"] = published
        hub.private.add("someone/Stories-15M")
        arguments = (
            "quantize",
            "someone/Stories-15M",
            "-b",
            "gguf",
            "-f",
            "Q8_0",
            "--revision",
            "main",
            "--json",
        )
        refused = _run(hub, tmp_path, *arguments)
        assert refused.returncode == 2
        assert "neither a local path nor a model on the hub" in refused.stderr
        done = _run(hub, tmp_path, *arguments, "--token", hub.token)
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    path = tmp_path / "quantized_models" / "Stories-15M-Q8_0.gguf"
    assert info["source_model"] == "someone/Stories-15M"
    assert info["input_format"] == "huggingface"
    assert "Stories" in read_gguf_header(path).metadata["general.name"]
    manifest = path.with_name("Stories-15M-Q8_0.manifest.json").read_text()
    assert json.loads(manifest)["source"]["revision"] == COMMIT
    assert hub.token not in manifest + done.stdout + done.stderr


def test_an_unsupported_model_is_refused_before_its_weights_travel(
    published: dict[str, bytes], tmp_path: Path
) -> None:
    config = {**json.loads(published["config.json"]), "architectures": ["UnheardOfForCausalLM"]}
    with serve() as hub:
        hub.repos["someone/odd"] = {**published, "config.json": json.dumps(config).encode()}
        done = _run(hub, tmp_path, "quantize", "someone/odd", "-b", "gguf", "-f", "Q8_0")
        assert done.returncode == 2
        assert "does not support the architecture UnheardOfForCausalLM" in done.stderr
        assert not any(path.endswith(".safetensors") for _, path, _ in hub.requests)


def test_an_importance_matrix_from_a_hub_dataset(stories15m: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"Story {n}. A small cat sat on a mat and saw a bird."}) for n in range(30)]
    with serve() as hub:
        hub.repos["datasets/owner/texts"] = {"README.md": b"", "train.jsonl": "\n".join(lines).encode()}
        options = ("-O", "calibration_dataset=owner/texts", "-O", "seq_length=32", "-O", "num_samples=2")
        done = _run(
            hub, tmp_path, "quantize", str(stories15m), "-b", "gguf", "-f", "IQ2_S", "--json", *options
        )
    assert done.returncode == 0, done.stderr
    matrix = json.loads(done.stdout)["importance_matrix"]
    assert matrix["datasets"] == ["owner/texts"]
    assert (matrix["chunks"], matrix["chunk_size"], matrix["entries"]) == (2, 32, 42)
