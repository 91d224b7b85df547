from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from qwodel.exceptions import Cancelled, ResourceError, ValidationError
from qwodel.hub import HubModel, looks_like_hub_id
from qwodel.progress import Progress
from tests.hub_server import COMMIT, Hub, serve

CONFIG = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as server:
        for name, value in {"HF_ENDPOINT": server.url, "ENDPOINT": server.url}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        server.repos["owner/tiny"] = {
            "config.json": json.dumps(CONFIG).encode(),
            "tokenizer.json": b"{}",
            "LICENSE": b"free",
            "model.safetensors": save(
                {"model.embed_tokens.weight": torch.ones(300, 200, dtype=torch.bfloat16)}
            ),
            "pytorch_model.bin": b"not wanted",
            "onnx/model.onnx": b"not wanted",
        }
        yield server


def test_ids_are_told_from_paths() -> None:
    for text in ("gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b_c.d"):
        assert looks_like_hub_id(text)
    for text in ("./model", "/abs/model", "a/b/c", "model.gguf", "~/x", "../x", "", "a b"):
        assert not looks_like_hub_id(text)


def test_what_is_needed_is_downloaded_and_described(hub: Hub) -> None:
    seen: list[tuple[int, str, str]] = []
    source = HubModel("owner/tiny").fetch(Progress(lambda *event: seen.append(event), {"resolve": 1}))
    assert source.given == "owner/tiny"
    assert source.name == "tiny"
    assert source.revision == COMMIT
    assert source.parameters == 60_000
    assert {file.name for file in source.path.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "LICENSE",
        "model.safetensors",
    }
    assert any("downloading owner/tiny" in message for _, _, message in seen)


def test_pickled_weights_are_taken_only_where_there_is_nothing_else(hub: Hub) -> None:
    del hub.repos["owner/tiny"]["model.safetensors"]
    with pytest.raises(ValidationError, match="neither a zip archive nor a pickle"):
        HubModel("owner/tiny").fetch(Progress(None))
    del hub.repos["owner/tiny"]["pytorch_model.bin"]
    with pytest.raises(ValidationError, match="holds no model weights"):
        HubModel("owner/tiny").fetch(Progress(None))


def test_config_comes_without_weights(hub: Hub) -> None:
    assert HubModel("owner/tiny").config() == CONFIG
    assert not any("safetensors" in path for _, path, _ in hub.requests)
    del hub.repos["owner/tiny"]["config.json"]
    assert HubModel("owner/tiny", "main").config() == {}


def test_describing_reads_only_remote_headers(hub: Hub) -> None:
    facts = HubModel("owner/tiny").describe()
    assert facts["parameters"] == 60_000
    assert facts["dtypes"] == {"BF16": 60_000}
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["weight_files"] == ["model.safetensors"]
    assert facts["tensor_list"] == [
        {"name": "model.embed_tokens.weight", "dtype": "BF16", "shape": [300, 200]}
    ]
    ranged = [header for _, path, header in hub.requests if path.endswith("model.safetensors") and header]
    assert ranged


def _ranges(hub: Hub) -> list[str]:
    return [
        header for method, path, header in hub.requests if method == "GET" and path.endswith(".safetensors")
    ]


def test_a_line_that_goes_dead_is_taken_up_where_it_stopped(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    hub.cut_after = 50_000
    assert HubModel("owner/tiny").fetch(Progress(None)).parameters == 60_000
    assert len(_ranges(hub)) == 3


def test_the_next_run_keeps_the_shards_it_has(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    files = hub.repos["owner/tiny"]
    del files["model.safetensors"]
    for part, size in (("1", 10), ("2", 400)):
        files[f"model-0000{part}-of-00002.safetensors"] = save({f"w{part}": torch.ones(size, 100)})
    hub.dead.add("model-00002-of-00002.safetensors")
    with pytest.raises(ValidationError, match="the hub cannot be reached"):
        HubModel("owner/tiny").fetch(Progress(None))
    hub.dead.clear()
    hub.requests.clear()
    assert HubModel("owner/tiny").fetch(Progress(None)).parameters == 41_000
    fetched = [path for method, path, _ in hub.requests if method == "GET" and path.endswith(".safetensors")]
    assert [path.rsplit("/", 1)[-1] for path in fetched] == ["model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_private_and_missing_repositories_look_alike(hub: Hub, token: str | None) -> None:
    hub.private.add("owner/tiny")
    for repo in ("owner/tiny", "owner/none"):
        with pytest.raises(ValidationError, match="neither a local path nor a model on the hub") as caught:
            HubModel(repo, token=token).config()
        assert "hf_wrong" not in str(caught.value)
        assert "token=" in (caught.value.hint or "")
    assert HubModel("owner/tiny", token=hub.token).config() == CONFIG


def test_a_gated_repository_says_what_to_do(hub: Hub) -> None:
    hub.gated.add("owner/tiny")
    with pytest.raises(ValidationError, match="owner/tiny is gated") as caught:
        HubModel("owner/tiny").config()
    assert "huggingface.co/owner/tiny" in (caught.value.hint or "")
    assert HubModel("owner/tiny", token=hub.token).fetch(Progress(None)).parameters == 60_000


def test_an_unknown_revision_is_named(hub: Hub) -> None:
    with pytest.raises(ValidationError, match="no revision 'v9'"):
        HubModel("owner/tiny", "v9").config()
    assert HubModel("owner/tiny", COMMIT).config() == CONFIG


def test_unreachable_and_offline_use_the_cache_or_say_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    HubModel("owner/tiny").fetch(Progress(None))

    def refuse(*_: object, **__: object) -> object:
        raise httpx.ConnectError("nobody there")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    assert HubModel("owner/tiny").fetch(Progress(None)).parameters == 60_000
    with pytest.raises(ValidationError, match="the hub cannot be reached") as caught:
        HubModel("owner/other").config()
    assert "HF_HUB_OFFLINE" in (caught.value.hint or "")


def test_a_disk_too_small_is_refused_before_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="needs 0.0 GB, and"):
        HubModel("owner/tiny").fetch(Progress(None))
    assert not any(path.endswith("model.safetensors") for _, path, _ in hub.requests)


def test_a_raising_callback_cancels_the_download(hub: Hub) -> None:
    def stop(percent: int, stage: str, message: str) -> None:
        if "downloading" in message:
            raise RuntimeError("enough")

    with pytest.raises(Cancelled, match="enough"):
        HubModel("owner/tiny").fetch(Progress(stop, {"resolve": 1}))


def test_the_token_is_in_no_representation() -> None:
    assert "hf_" not in repr(HubModel("a/b", token="hf_secret"))
