"""Hub datasets, from a hub on loopback: what is read, what is cached, and every way to fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hub_server import Hub, serve

# The hub's address is read when the libraries are imported, so reads run in processes of their own,
# as many as must not share memory.
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
for line in sys.stdin:
    spec, settings = json.loads(line)
    try:
        tokens = load_tokens(spec, tokenizer, num_samples=2, seq_length=10, **settings)
        print(json.dumps({"tokens": tokens.tolist()}), flush=True)
    except CalibrationError as error:
        print(json.dumps({"error": str(error), "hint": error.hint}), flush=True)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as server:
        lines = [
            json.dumps({"text": " ".join(f"w{n}" for n in range(at, at + 50))}) for at in range(0, 1000, 50)
        ]
        for name in ("texts", "more", "gated"):
            files = {"README.md": b"", "train.jsonl": "\n".join(lines).encode()}
            server.repos[f"datasets/owner/{name}"] = files
        server.gated.add("datasets/owner/gated")
        yield server


class Reader:
    """A process that reads one set after the other; its errors go to ``log``."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log

    def load(self, spec: str, **settings: str) -> dict[str, object]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([spec, settings]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        assert "hf_secret" not in line
        answer: dict[str, object] = json.loads(line)
        return answer


@contextmanager
def _reader(hub: Hub, folder: Path, *, offline: bool = False) -> Iterator[Reader]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "QWODEL_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1" if offline else "0",
    }
    environment.pop("HF_TOKEN", None)
    log = folder / "errors.txt"
    with (
        log.open("a") as errors,
        subprocess.Popen(
            [sys.executable, "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=folder,
        ) as process,
    ):
        yield Reader(process, log)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def reader(hub: Hub, folder: Path) -> Iterator[Reader]:
    with _reader(hub, folder) as found:
        yield found


def test_a_hub_set_is_streamed_once_and_then_served_from_the_cache(
    hub: Hub, folder: Path, reader: Reader
) -> None:
    first = reader.load("owner/texts")
    assert [row[0] % 10 for row in first["tokens"]] == [0, 0]  # type: ignore[attr-defined]
    hub.requests.clear()
    with _reader(hub, folder) as another:
        assert another.load("owner/texts") == first
    assert hub.requests, "the commit must have been asked for"
    assert not [path for _, path, _ in hub.requests if "jsonl" in path]
    # And without the hub, what the last known commit gave.
    with _reader(hub, folder, offline=True) as offline:
        assert offline.load("owner/texts") == first
        missing = offline.load("owner/texts", split="validation")
    assert "cannot be reached" in str(missing["error"])
    assert "local .txt" in str(missing["hint"])


def test_gated_missing_and_private_sets_give_their_cause(hub: Hub, reader: Reader) -> None:
    refused = reader.load("owner/gated")
    assert "gated" in str(refused["error"])
    assert "huggingface.co/datasets/owner/gated" in str(refused["hint"])
    assert "local .txt" in str(refused["hint"])
    assert "tokens" in reader.load("owner/gated", token=hub.token)

    none = reader.load("owner/none")
    assert "neither a local file nor a dataset on the hub" in str(none["error"])
    assert "local .txt" in str(none["hint"])


def test_wrong_split_subset_and_column_are_told_apart(reader: Reader) -> None:
    split = reader.load("owner/more", split="nowhere")
    assert "no split 'nowhere'" in str(split["error"])
    assert "train" in str(split["error"])
    subset = reader.load("owner/more:none")
    assert "'none'" in str(subset["error"])
    column = reader.load("owner/more", column="story")
    assert "no text column 'story'" in str(column["error"])
    assert "its columns: text" in str(column["hint"])
