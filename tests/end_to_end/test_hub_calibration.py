"""Calibration sets on a hub served on loopback, from the command line to the published directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.awq.models import tiny_model, write_jsonl
from tests.hub_server import Hub, serve


def _run(hub: Hub, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1",
        "QWODEL_CACHE": str(folder / "cache"),
    }  # fmt: skip
    environment.pop("HF_TOKEN", None)
    sizes = ("-O", "num_samples=8", "-O", "seq_len=32", "-O", "batch_size=4", "-O", "n_grid=4")
    command = [
        sys.executable,
        "-m",
        "qwodel",
        "quantize",
        "tiny-llama",
        "-b",
        "awq",
        "-f",
        "int4",
        *sizes,
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)


@pytest.mark.slow
def test_a_gated_set_is_named_and_with_its_token_used(tmp_path: Path) -> None:
    tiny_model("Llama", tmp_path)
    text = write_jsonl(tmp_path / "train.jsonl").read_bytes()
    with serve() as hub:
        hub.repos["datasets/owner/secret"] = {"README.md": b"", "train.jsonl": text}
        hub.gated.add("datasets/owner/secret")
        dataset = ("-O", "calibration_dataset=owner/secret")
        refused = _run(hub, tmp_path, *dataset)
        assert refused.returncode != 0
        assert "the calibration set owner/secret is gated" in refused.stderr
        assert "local .txt" in " ".join(refused.stderr.split())
        assert not (tmp_path / "quantized_models").exists()
        done = _run(hub, tmp_path, *dataset, "--token", hub.token, "--json")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["calibration"]["dataset"] == "owner/secret"
    manifest = (tmp_path / "quantized_models" / "tiny-llama-AWQ-int4" / "qwodel.manifest.json").read_text()
    assert hub.token not in manifest + done.stdout + done.stderr
