"""Hub datasets, from a hub on loopback: what is read, what is cached, and every way to fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import Hub, serve

# The hub's address is read when the libraries are imported, so each read has a process of its own.
_SCRIPT = """
import json, sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from qwodel.calibration import load_tokens
from qwodel.exceptions import CalibrationError

words = {f"w{n}": n for n in range(1000)} | {"?": 1000}
backend = Tokenizer(models.WordLevel(words, "?"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
try:
    tokens = load_tokens(sys.argv[1], tokenizer, num_samples=2, seq_length=10, **json.loads(sys.argv[2]))
    print(json.dumps({"tokens": tokens.tolist()}))
except CalibrationError as error:
    print(json.dumps({"error": str(error), "hint": error.hint}))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as server:
        lines = [
            json.dumps({"text": " ".join(f"w{n}" for n in range(at, at + 50))}) for at in range(0, 1000, 50)
        ]
        server.repos["datasets/owner/texts"] = {"README.md": b"", "train.jsonl": "\n".join(lines).encode()}
        yield server


def _load(hub: Hub, folder: Path, spec: str, *, offline: bool = False, **settings: str) -> dict[str, object]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "QWODEL_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1" if offline else "0",
    }
    environment.pop("HF_TOKEN", None)
    command = [sys.executable, "-c", _SCRIPT, spec, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_a_hub_set_is_streamed_once_and_then_served_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    first = _load(hub, tmp_path, "owner/texts")
    assert [row[0] % 10 for row in first["tokens"]] == [0, 0]  # type: ignore[attr-defined]
    hub.requests.clear()
    assert _load(hub, tmp_path, "owner/texts") == first
    assert not [path for _, path, _ in hub.requests if "jsonl" in path]
    # And without the hub, what the last known commit gave.
    assert _load(hub, tmp_path, "owner/texts", offline=True) == first
    missing = _load(hub, tmp_path, "owner/texts", offline=True, split="validation")
    assert "cannot be reached" in str(missing["error"])
    assert "local .txt" in str(missing["hint"])


def test_gated_missing_and_private_sets_give_their_cause(hub: Hub, tmp_path: Path) -> None:
    hub.repos["datasets/owner/gated"] = dict(hub.repos["datasets/owner/texts"])
    hub.gated.add("datasets/owner/gated")
    refused = _load(hub, tmp_path, "owner/gated")
    assert "gated" in str(refused["error"])
    assert "huggingface.co/datasets/owner/gated" in str(refused["hint"])
    assert "local .txt" in str(refused["hint"])
    assert "tokens" in _load(hub, tmp_path, "owner/gated", token=hub.token)

    none = _load(hub, tmp_path, "owner/none")
    assert "neither a local file nor a dataset on the hub" in str(none["error"])
    assert "local .txt" in str(none["hint"])


def test_wrong_split_subset_and_column_are_told_apart(hub: Hub, tmp_path: Path) -> None:
    split = _load(hub, tmp_path, "owner/texts", split="nowhere")
    assert "no split 'nowhere'" in str(split["error"])
    assert "train" in str(split["error"])
    subset = _load(hub, tmp_path, "owner/texts:none")
    assert "'none'" in str(subset["error"])
    column = _load(hub, tmp_path, "owner/texts", column="story")
    assert "no text column 'story'" in str(column["error"])
    assert "its columns: text" in str(column["hint"])
