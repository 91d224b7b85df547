"""Calibration sets from real (small) diffusers pipelines: what is kept, stored, resumed and refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from qwodel.exceptions import CalibrationError, ConfigurationError, DependencyError, IntegrityError
from qwodel.segquant import (
    AllSampler,
    BaseCalibSet,
    NormalSampler,
    Sampler,
    TimestepSampler,
    UniformSampler,
    generate_calibrate_set,
    load_calibrate_set,
)
from qwodel.segquant.sampling_run import seeded
from tests.segquant.pipelines import diffusers, dit_pipeline, flux_pipeline, unet_pipeline

STEPS = 6


def _same(first: Any, second: Any) -> bool:
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second)


def _recorded(layer: nn.Module, sample: Callable[[], Any], seed: int) -> list[dict[str, Any]]:
    """What the layer is called with in one run, by a hook of this test."""
    calls: list[dict[str, Any]] = []

    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append({"args": tuple(a.clone() for a in args), "kwargs": dict(kwargs)})

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    with seeded(seed, {}):
        sample()
    handle.remove()
    return calls


@pytest.fixture(scope="module")
def dit() -> Any:
    return dit_pipeline()


BATCHES: list[dict[str, Any]] = [{"class_labels": [1, 2]}, {"class_labels": [3, 4]}, {"class_labels": [5, 6]}]
LIMITS: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "np"}


def _dit_set(
    dit: Any, sampler: Sampler, path: Path | None = None, batches: Any = BATCHES, **more: Any
) -> BaseCalibSet:
    return generate_calibrate_set(dit, sampler, batches, dit.transformer, path, **{**LIMITS, **more})


@pytest.mark.parametrize(
    "sampler",
    [
        AllSampler(),
        UniformSampler(timestep_per_sample=3),
        NormalSampler(timestep_per_sample=2),
        TimestepSampler(timesteps=(0, 4)),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_the_calls_the_sampler_wants_with_their_names(dit: Any, sampler: Sampler) -> None:
    found = list(_dit_set(dit, sampler))
    expected = []
    for run, batch in enumerate(BATCHES):
        calls = _recorded(dit.transformer, lambda batch=batch: dit(**batch, **LIMITS), run)
        assert len(calls) == STEPS
        expected += [calls[number] for number in sampler.choose(STEPS, run)]
    assert len(found) == len(expected)
    assert all(map(_same, found, expected))
    assert set(found[0]["kwargs"]) == {"timestep", "class_labels"}
    assert not dit.transformer._forward_pre_hooks


def test_a_run_ends_after_the_last_call_wanted(dit: Any) -> None:
    calls: list[int] = []
    handle = dit.transformer.register_forward_hook(lambda *_: calls.append(1) and None)
    found = _dit_set(dit, TimestepSampler(timesteps=(1,), max_timestep=3, sample_size=2))
    handle.remove()
    assert len(found) == 2
    assert len(calls) == 3 + 2  # three are counted in the first run


@pytest.mark.parametrize(
    ("pipeline", "batches", "kwargs", "names"),
    [
        (unet_pipeline, [(1,), (2,)], {"num_inference_steps": 3}, set()),
        (
            lambda: unet_pipeline(diffusers.DDPMScheduler()),
            DataLoader([{"batch_size": 1}], batch_size=None),
            {"num_inference_steps": 3},
            set(),
        ),
        (
            flux_pipeline,
            [{"prompt_embeds": torch.ones(1, 5, 16), "pooled_prompt_embeds": torch.ones(1, 12)}],
            {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "latent"},
            {"hidden_states", "timestep", "encoder_hidden_states", "txt_ids", "return_dict"},
        ),
    ],
    ids=["DDIM", "loader", "Flux"],
)
def test_pipelines_and_schedulers(
    pipeline: Any, batches: Any, kwargs: Any, names: set[str], tmp_path: Path
) -> None:
    pipeline = pipeline()
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    found = generate_calibrate_set(pipeline, AllSampler(), batches, denoiser, tmp_path / "set", **kwargs)
    assert len(found) == 3 * len(batches)
    assert names <= set(found[0]["kwargs"])
    again = load_calibrate_set(tmp_path / "set")
    assert again is not None
    for args, named in again.dataloader():
        with torch.no_grad():
            denoiser(*args, **named)


def test_any_callable_and_any_layer() -> None:
    body = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))

    def sample(start: torch.Tensor, steps: int) -> torch.Tensor:
        for _ in range(steps):
            start = start - 0.1 * body(start)
        return start

    loader = DataLoader([(torch.full((4,), float(i)), 5) for i in range(4)], batch_size=2)
    loader.collate_fn = lambda items: (torch.stack([first for first, _ in items]), items[0][1])
    found = generate_calibrate_set(sample, AllSampler(), loader, body[2])
    assert len(found) == 2 * 5
    assert torch.equal(found[5]["args"][0], body[1](body[0](torch.tensor([[2.0] * 4, [3.0] * 4]))).detach())
    prompts = generate_calibrate_set(
        lambda texts: body(torch.ones(len(texts), 4)), AllSampler(), [["a", "b"]], body
    )
    assert prompts[0]["args"][0].shape == (2, 4)


@pytest.mark.parametrize("compress", [True, False])
def test_stored_in_chunks(dit: Any, tmp_path: Path, compress: bool) -> None:
    memory = list(_dit_set(dit, UniformSampler(timestep_per_sample=3)))
    stored = _dit_set(
        dit, UniformSampler(timestep_per_sample=3), tmp_path / "set", chunk_size=4, compress=compress
    )
    suffix = "pt.zst" if compress else "pt"
    assert sorted(each.name for each in (tmp_path / "set").iterdir()) == [
        *(f"chunk_00{place}.{suffix}" for place in range(3)),
        "meta.json",
    ]
    assert json.loads((tmp_path / "set" / "meta.json").read_text())["chunk_lens"] == [4, 4, 1]
    loaded = load_calibrate_set(tmp_path / "set", compress=compress)
    assert loaded is not None
    for each in (stored, loaded):
        assert len(each) == 9
        assert all(map(_same, each, memory))
        assert _same(each[-1], memory[-1])
        with pytest.raises(IndexError):
            each[9]
    with pytest.raises(ConfigurationError, match=f"is stored {'' if compress else 'un'}compressed"):
        load_calibrate_set(tmp_path / "set", compress=not compress)


def test_the_spec_s_keywords_take_the_place_of_the_sampler_s(dit: Any) -> None:
    found = _dit_set(dit, UniformSampler(), max_timestep=4, sample_size=2, timestep_per_sample=2)
    assert [int(item["kwargs"]["timestep"][0]) for item in found] == [999, 500] * 2
    with pytest.raises(ConfigurationError, match="AllSampler has no timestep_per_sample"):
        _dit_set(dit, AllSampler(), timestep_per_sample=2)


def _dies_after(batches: list[Any], count: int) -> Iterator[Any]:
    yield from batches[:count]
    raise KeyboardInterrupt


@pytest.mark.parametrize(("chunk_size", "killed_after"), [(2, 1), (2, 2), (4, 2), (5, 2)])
def test_a_killed_run_goes_on_where_its_last_chunk_ended(
    dit: Any, tmp_path: Path, chunk_size: int, killed_after: int
) -> None:
    sampler = UniformSampler(timestep_per_sample=3)
    whole = list(_dit_set(dit, sampler))
    options = {"chunk_size": chunk_size}
    with pytest.raises(KeyboardInterrupt):
        _dit_set(dit, sampler, tmp_path / "set", batches=_dies_after(BATCHES, killed_after), **options)
    chunks = 3 * killed_after // chunk_size
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "set").glob("chunk*")}
    assert len(kept) == chunks
    with pytest.raises(CalibrationError, match="is not complete"):
        load_calibrate_set(tmp_path / "set")

    runs: list[int] = []
    handle = dit.transformer.register_forward_pre_hook(lambda *_: runs.append(1))
    resumed = _dit_set(dit, sampler, tmp_path / "set", **options)
    handle.remove()
    assert len(runs) == STEPS * (3 - chunks * chunk_size // 3)  # what is stored is not sampled again
    assert all((tmp_path / "set" / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert len(resumed) == len(whole)
    assert all(map(_same, resumed, whole))


def test_a_complete_set_is_returned_without_sampling(dit: Any, tmp_path: Path) -> None:
    first = list(_dit_set(dit, AllSampler(max_timestep=2), tmp_path / "set"))
    handle = dit.transformer.register_forward_pre_hook(lambda *_: pytest.fail("sampled again"))
    again = _dit_set(dit, AllSampler(max_timestep=2), tmp_path / "set")
    handle.remove()
    assert all(map(_same, again, first))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": UniformSampler(max_timestep=2)}, "sampler was 'AllSampler', is 'UniformSampler'"),
        ({"sampler": AllSampler(max_timestep=3)}, "max_timestep was 2, is 3"),
        ({"chunk_size": 7}, "chunk_size was 400, is 7"),
        ({"num_inference_steps": 4}, "other kwargs"),
        ({"compress": False}, "compress was True, is False"),
        ({"batches": BATCHES[::-1]}, "run 0 has other inputs"),
        ({"batches": BATCHES[:2]}, "gives 2 batches; the stored set has 3"),
        ({"batches": [*BATCHES, BATCHES[0]]}, "gives 4 batches; the stored set has 3"),
    ],
)
def test_a_stale_set_is_never_returned(
    dit: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings: dict[str, Any] = {"sampler": AllSampler(max_timestep=2), "path": tmp_path / "set"}
    _dit_set(dit, **settings)
    before = {file.name: file.read_bytes() for file in (tmp_path / "set").iterdir()}
    with pytest.raises(CalibrationError, match=message) as caught:
        _dit_set(dit, **settings | changes)
    assert caught.value.hint
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "set").iterdir()}


def test_other_weights_scheduler_or_layer(tmp_path: Path) -> None:
    def make(pipeline: Any, layer: str = "unet") -> BaseCalibSet:
        module = pipeline.unet.get_submodule(layer.removeprefix("unet").lstrip("."))
        return generate_calibrate_set(
            pipeline, AllSampler(), [()], module, tmp_path / "set", num_inference_steps=2
        )

    make(unet_pipeline())
    make(unet_pipeline())  # the same again
    changed = unet_pipeline()
    changed.unet.mid_block.resnets[0].conv1.weight.data[0, 0, 0, 0] += 1e-3
    with pytest.raises(CalibrationError, match="other weights"):
        make(changed)
    with pytest.raises(CalibrationError, match="scheduler was 'DDIMScheduler"):
        make(unet_pipeline(diffusers.DDIMScheduler(beta_start=2e-4)))
    with pytest.raises(CalibrationError, match="calib_layer was 'unet', is 'unet.mid_block'"):
        make(unet_pipeline(), "unet.mid_block")


def test_foreign_directories_and_damaged_files(dit: Any, tmp_path: Path) -> None:
    assert load_calibrate_set(tmp_path / "nothing") is None
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("mine")
    with pytest.raises(CalibrationError, match="no calibration set"):
        _dit_set(dit, AllSampler(), tmp_path / "photos")
    _dit_set(dit, AllSampler(max_timestep=1), tmp_path / "set")
    chunk = tmp_path / "set" / "chunk_000.pt.zst"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    loaded = load_calibrate_set(tmp_path / "set")
    assert loaded is not None
    with pytest.raises(IntegrityError, match="is not as it was written"):
        loaded[0]
    (tmp_path / "set" / "meta.json").write_text('{"format": "qwodel-calibration-set", "version": 99}')
    with pytest.raises(CalibrationError, match="of this version"):
        load_calibrate_set(tmp_path / "set")


class _Own(nn.Module):
    def forward(self, x: torch.Tensor, state: object = None) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer: generate_calibrate_set(lambda: 0, AllSampler(), [()], layer), "_Own, was not called"),
        (lambda layer: generate_calibrate_set(layer, AllSampler(), [], layer), "gives 0 batches"),
        (
            lambda layer: generate_calibrate_set(layer, AllSampler(), [torch.ones(1)], layer, state=object()),
            "argument state of the layer to record is a object",
        ),
    ],
)
def test_nothing_to_record(call: Callable[[nn.Module], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        call(_Own())


def test_a_failed_run_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError):
        generate_calibrate_set(_Own(), AllSampler(), [torch.ones(1)], _Own(), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_zstandard_is_missing(dit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(DependencyError, match="zstandard") as caught:
        _dit_set(dit, AllSampler(), tmp_path / "set")
    assert "qwodel[segquant]" in str(caught.value.hint)


def test_batches_join_calls(dit: Any) -> None:
    found = _dit_set(dit, UniformSampler(timestep_per_sample=2))
    batches = list(found.dataloader(batch_size=4))
    assert [batch[0][0].shape[0] for batch in batches] == [16, 8]
    assert torch.equal(batches[0][0][0], torch.cat([found[place]["args"][0] for place in range(4)]))
    assert torch.equal(
        batches[0][1]["timestep"], torch.cat([found[place]["kwargs"]["timestep"] for place in range(4)])
    )
    scalar = BaseCalibSet(
        [{"args": (torch.ones(2, 3), torch.tensor(t)), "kwargs": {"flag": False}} for t in (5, 7)]
    )
    args, kwargs = next(iter(scalar.dataloader(batch_size=2)))
    assert args[1].tolist() == [5, 5, 7, 7]
    assert kwargs == {"flag": False}
    unlike = BaseCalibSet([{"args": (torch.ones(2, size),), "kwargs": {}} for size in (3, 4)])
    with pytest.raises(CalibrationError, match="cannot be joined"):
        next(iter(unlike.dataloader(batch_size=2)))
