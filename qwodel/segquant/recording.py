"""generate_calibrate_set: sampling runs, and what one layer reads during them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwodel.exceptions import CalibrationError, ConfigurationError
from qwodel.output import disk_errors
from qwodel.segquant.calibration_files import Meta, read_meta, require_zstd, write_chunk, write_meta
from qwodel.segquant.calibration_set import BaseCalibSet, DiskCalibSet, Item
from qwodel.segquant.fingerprint import describe_inputs, describe_model, differences
from qwodel.segquant.samplers import Sampler
from qwodel.segquant.sampling_run import call_arguments, seeded, to_cpu

__all__ = ["generate_calibrate_set"]

_SAMPLER_KEYS = ("max_timestep", "sample_size", "timestep_per_sample")
_PLAIN = (torch.Tensor, str, int, float, bool, type(None), torch.dtype, torch.device)


def generate_calibrate_set(
    model: Callable[..., Any],
    sampler: Sampler,
    sample_dataloader: Iterable[Any],
    calib_layer: nn.Module,
    dump_path: str | Path | None = None,
    chunk_size: int = 400,
    compress: bool = True,
    **kwargs: Any,
) -> BaseCalibSet:
    """Run a sampling model and keep what one of its layers is called with.

    Every batch of the loader is one sampling run: a mapping gives keyword arguments, a tuple (or the
    list that ``DataLoader`` makes of tuples) positional ones, anything else one argument. A run starts
    from a seed of its own, so that it gives the same whether or not others went before it, and ends
    after the last call that the sampler wants. Where the sampler has no ``max_timestep``, the
    first run is kept whole until its calls are counted.

    A set in ``dump_path`` that was made with the same model, sampler, inputs and settings is taken up
    where it was left: it is returned if complete, and goes on after its last chunk otherwise.

    Args:
        model: a diffusers pipeline or any other callable.
        sampler: which calls of a run are kept.
        sample_dataloader: sampling inputs, in the same order whenever it is iterated.
        calib_layer: the denoiser, or any module within the model.
        dump_path: directory of the set; ``None`` keeps it in memory.
        chunk_size: items in a chunk.
        compress: store chunks with Zstandard.
        **kwargs: passed to every call of the model, but for ``max_timestep``, ``sample_size`` and
            ``timestep_per_sample``, which take the place of the sampler's.

    Raises:
        CalibrationError: the directory holds a set made in another way, or something else; the
            layer is never called; an input is neither tensor nor plain value; there are no inputs.
        ConfigurationError: a setting is out of range.
        DependencyError: ``compress`` is on and zstandard is missing.
    """
    if chunk_size < 1:
        raise ConfigurationError(f"chunk_size is {chunk_size}", hint="give 1 or more")
    sampler = _with_settings(sampler, kwargs)
    if dump_path is None:
        memory = _Memory()
        _sample(model, sampler, sample_dataloader, calib_layer, kwargs, memory)
        return BaseCalibSet(memory.items)
    if compress:
        require_zstd()
    settings = {
        **describe_model(model, calib_layer),
        **{
            key: list(value) if isinstance(value, tuple) else value
            for key, value in sampler.settings().items()
        },
        "kwargs": describe_inputs(kwargs),
        "compress": compress,
        "chunk_size": chunk_size,
    }
    folder = Path(dump_path)
    store = _Directory(folder, _matching_meta(folder, settings, compress, chunk_size))
    _sample(model, sampler, sample_dataloader, calib_layer, kwargs, store)
    return DiskCalibSet(folder, store.meta)


class _Memory:
    """Where items go; ``position`` is the run to go on with and how many of its items there are."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.meta = Meta({}, compress=False, chunk_size=0)

    def add(self, item: dict[str, Any]) -> None:
        self.items.append(item)
        self.meta.within += 1

    def end_run(self) -> None:
        self.meta.run, self.meta.within = self.meta.run + 1, 0

    def finish(self) -> None:
        """Nothing is buffered."""


class _Directory:
    """Items buffered to chunks; ``meta`` on disk speaks of written chunks alone."""

    def __init__(self, folder: Path, meta: Meta) -> None:
        self.meta = meta
        self._folder = folder
        self._buffer: list[dict[str, Any]] = []

    def add(self, item: dict[str, Any]) -> None:
        self._buffer.append(item)
        self.meta.within += 1
        if len(self._buffer) == self.meta.chunk_size:
            self._flush()

    def end_run(self) -> None:
        self.meta.run, self.meta.within = self.meta.run + 1, 0

    def finish(self) -> None:
        self.meta.complete = True
        self._flush()

    def _flush(self) -> None:
        with disk_errors(f"writing {self._folder}"):
            self._folder.mkdir(parents=True, exist_ok=True)
        if self._buffer:
            write_chunk(self._folder, self.meta, self._buffer)
            self._buffer = []
        write_meta(self._folder, self.meta)


def _with_settings(sampler: Sampler, kwargs: dict[str, Any]) -> Sampler:
    given = {key: kwargs.pop(key) for key in _SAMPLER_KEYS if key in kwargs}
    unknown = [key for key in given if not hasattr(sampler, key)]
    if unknown:
        raise ConfigurationError(
            f"{type(sampler).__name__} has no {unknown[0]}",
            hint="it belongs to UniformSampler and NormalSampler",
        )
    return replace(sampler, **given) if given else sampler


def _matching_meta(folder: Path, settings: dict[str, Any], compress: bool, chunk_size: int) -> Meta:
    meta = read_meta(folder)
    if meta is None:
        return Meta(settings, compress, chunk_size)
    different = differences(meta.settings, settings)
    if different:
        raise CalibrationError(
            f"the calibration set in {folder} was made in another way: {'; '.join(different)}",
            hint="give another dump_path, remove the directory, or take it as it is with load_calibrate_set",
        )
    return meta


def _sample(
    model: Callable[..., Any],
    sampler: Sampler,
    loader: Iterable[Any],
    layer: nn.Module,
    kwargs: Mapping[str, Any],
    store: _Memory | _Directory,
) -> None:
    """Run what is not stored yet, and check the inputs of what is."""
    meta = store.meta
    known = len(meta.inputs)
    runs = 0
    for run, batch in enumerate(loader):
        if run == sampler.sample_size:
            break
        runs = run + 1
        _check_inputs(meta, run, describe_inputs(batch))
        if run < meta.run or meta.complete:
            continue
        if meta.calls is not None and meta.within == len(sampler.choose(meta.calls, run)):
            store.end_run()  # its last item was the last of a chunk
            continue
        args, named = call_arguments(batch)
        recorder = _Recorder(sampler, run, meta.calls, skip=meta.within, keep=store.add)
        named = {**kwargs, **named}
        with seeded(sampler.seed + run, named):
            recorder.watch(layer, partial(model, *args, **named))
        meta.calls = recorder.calls
        store.end_run()
    if runs == 0 or runs < known or (meta.complete and runs > known):
        raise CalibrationError(
            f"the data loader gives {runs} batches" + (f"; the stored set has {known}" if runs else ""),
            hint="give the loader that the set was made with" if runs else "give at least one batch",
        )
    if not meta.complete:
        store.finish()


def _check_inputs(meta: Meta, run: int, digest: str) -> None:
    if run == len(meta.inputs):
        meta.inputs.append(digest)
    elif meta.inputs[run] != digest:
        raise CalibrationError(
            f"sampling run {run} has other inputs than when it was stored",
            hint="give the same data without shuffling, or another dump_path",
        )


class _Enough(Exception):  # noqa: N818 - it ends a run that has given all that is wanted
    pass


class _Recorder:
    """Keeps the calls of one run that the sampler wants; all of them until ``calls`` is known."""

    def __init__(
        self, sampler: Sampler, run: int, calls: int | None, skip: int, keep: Callable[[dict[str, Any]], None]
    ) -> None:
        self.calls = calls
        self._sampler, self._run, self._skip, self._keep = sampler, run, skip, keep
        self._wanted = None if calls is None else list(sampler.choose(calls, run))
        self._last = self._wanted[-1] if self._wanted else (sampler.max_timestep or sys.maxsize) - 1
        self._kept: list[dict[str, Any]] = []
        self._seen = 0

    def watch(self, layer: nn.Module, sample: Callable[[], Any]) -> None:
        """Run ``sample`` and keep what ``layer`` is called with."""
        handle = layer.register_forward_pre_hook(self._hook, with_kwargs=True)
        try:
            with torch.no_grad(), contextlib.suppress(_Enough):
                sample()
        finally:
            handle.remove()
        if not self._seen:
            raise CalibrationError(
                f"the layer to record, {type(layer).__name__}, was not called",
                hint="calib_layer must be a module that the model calls while it samples",
            )
        if self.calls is None:
            self.calls = self._seen
            for number in self._sampler.choose(self._seen, self._run):
                self._hand_over(self._kept[number])

    def _hook(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number = self._seen
        if number > self._last:
            raise _Enough
        self._seen += 1
        if self._wanted is None:
            self._kept.append(_item(args, kwargs))
        elif number in self._wanted:
            self._hand_over(_item(args, kwargs))

    def _hand_over(self, item: dict[str, Any]) -> None:
        if self._skip:
            self._skip -= 1
        else:
            self._keep(item)


def _item(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    for name, value in (*enumerate(args), *kwargs.items()):
        _check_plain(str(name), value)
    return {"args": to_cpu(tuple(args)), "kwargs": to_cpu(dict(kwargs))}


def _check_plain(name: str, value: Any) -> None:
    if type(value) in (tuple, list):
        for each in value:
            _check_plain(name, each)
    elif type(value) is dict:
        for each in value.values():
            _check_plain(name, each)
    elif not isinstance(value, _PLAIN):
        raise CalibrationError(
            f"argument {name} of the layer to record is a {type(value).__name__}, which cannot be stored safely",
            hint="record a layer that takes tensors and plain values",
        )
