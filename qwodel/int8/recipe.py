"""The arguments of :func:`~qwodel.int8.convert.convert_to_int8`, checked and turned into an engine recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwodel.algorithms.converter_options import rounding_options
from qwodel.checkpoint.families.layer_filters import validate_filters
from qwodel.checkpoint.formats.codec import Codec
from qwodel.checkpoint.formats.registry import storage_format
from qwodel.checkpoint.layouts.comfyui import ComfyUILayout
from qwodel.checkpoint.lora.merge import LoraSource
from qwodel.checkpoint.plan.layer_config import LayerConfig
from qwodel.checkpoint.plan.recipe import LayerOverride, Recipe
from qwodel.checkpoint.rounding.methods import Learned, Nearest, Rounding
from qwodel.devices import StreamingOptions, resolve_device
from qwodel.exceptions import ConfigurationError, did_you_mean
from qwodel.int8.columnwise import COLUMNWISE, columnwise_rounding, learned_with_data, quip_format

__all__ = ["Int8Arguments"]

_DEFAULT_STREAMING = "balanced"
_AGGRESSIVENESS = {"conservative": "minimal", "balanced": "balanced", "aggressive": "aggressive"}
"""STREAMING_AGGRESSIVENESS in the environment → the mode that stands for the default one."""
_NEUTRAL_ENVIRONMENT = {
    "ENABLE_MIXED_HADAMARD": (
        "auto",
        "Hadamard transforms are computed in fp64 here: one that is rounded cannot be undone",
    ),
    "MIXED_HADAMARD_DTYPE": (
        "bfloat16",
        "Hadamard transforms are computed in fp64 here: one that is rounded cannot be undone",
    ),
}
_SCALING_MODES = ("tensor", "row", "block", "convrot")
_LEARNING = {"num_iter": 1000, "lr": 0.008, "top_p": 0.2, "min_k": 64, "max_k": 1024}
_NEEDS_GPTQ = {"gptq_actorder": False, "gptq_fast": True, "gptq_turbo": False}
_NEEDS_QUIP = {
    "quip_actorder": True, "quip_hadamard": True, "quip_seed": None, "quip_store_transformed": False,
    "quip_requant_scheme": "tensor", "quip_requant_tensor_per_row": True, "quip_checkpointed": False,
    "quip_checkpoint_threshold": 8192, "quip_checkpoint_segments": 4,
}  # fmt: skip
_DEPENDENT: Mapping[tuple[str, ...], Mapping[str, Any]] = {
    ("custom_layers",): {
        "custom_type": None, "custom_block_size": None, "custom_scaling_mode": None, "custom_simple": False,
        "custom_heur": False,
    },
    ("fallback",): {"fallback_block_size": None, "fallback_simple": False},
    ("layer_config",): {"layer_config_fullmatch": False},
    ("smoothquant",): {"smoothquant_alpha": 0.5},
    ("merge_lora_path", "merge_lora_paths"): {"merge_lora_scale": 1.0, "merge_lora_dampen": True},
}  # fmt: skip
_UNSUPPORTED = {
    "smoothquant": (
        False,
        "readers of INT8 files cannot undo its factors; the format int8_convrot tames outliers",
    ),
    "calibration_lora_path": (
        None,
        "a LoRA does not say what inputs a layer sees; merge_lora_path merges it",
    ),
}


@dataclass(frozen=True, slots=True)
class Int8Arguments:
    """Every argument of ``convert_to_int8`` but the two files; names and defaults are its own."""

    comfy_quant: bool
    filter_flags: Mapping[str, bool]
    calib_samples: int
    seed: int
    options: Mapping[str, Any]
    converter: Mapping[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Int8Arguments:
        """Sort all arguments of the function, by name."""
        own = {name: given[name] for name in ("comfy_quant", "filter_flags", "calib_samples", "seed")}
        others = (*own, "input_file", "output_file", "converter_kwargs")
        options = {name: value for name, value in given.items() if name not in others}
        return cls(**own, options=options, converter=given.get("converter_kwargs", {}))

    def check(self) -> None:
        """Refuse what would have no effect.

        Raises:
            ConfigurationError: names the argument and says why.
        """
        for name, (neutral, why) in _UNSUPPORTED.items():
            if self.options[name] != neutral:
                raise ConfigurationError(f"{name} is not supported: {why}", hint=f"leave {name} out")
        methods: tuple[tuple[str, Mapping[str, Any]], ...] = (("gptq", _NEEDS_GPTQ), ("quip", _NEEDS_QUIP))
        for method, needs in methods:
            for name, neutral in needs.items():
                if self.optimizer() != method and self.options[name] != neutral:
                    raise ConfigurationError(f"{name} has an effect with optimizer={method!r} only")
        for owner, dependents in _DEPENDENT.items():
            if not any(self.options[name] for name in owner):
                for name, neutral in dependents.items():
                    if self.options[name] != neutral:
                        raise ConfigurationError(f"{name} has an effect with {' or '.join(owner)} only")
        for name, (default, why) in _NEUTRAL_ENVIRONMENT.items():
            if os.environ.get(name, default) != default:
                raise ConfigurationError(
                    f"the environment sets {name}={os.environ[name]}, which is not supported: {why}",
                    hint=f"unset {name}",
                )
        if self.calib_samples < 0:
            raise ConfigurationError(f"calib_samples counts samples, so it is not {self.calib_samples}")

    def optimizer(self) -> str:
        """Return the method that chooses codes: GPTQ where there are statistics and nothing else is asked for."""
        if self.options["no_learned_rounding"] or self.options["fp16"]:
            return "none"
        given = self._settings()
        if "optimizer" in given:
            return str(given["optimizer"])
        return "gptq" if self.options["calibration_data_path"] is not None and not given else "original"

    def _settings(self) -> dict[str, Any]:
        """Return keyword arguments that belong to the method."""
        engine = ("scaling_mode", "block_size", "device", "workers")
        return {name: value for name, value in self.converter.items() if name not in engine}

    def device(self) -> torch.device:
        """Return where codes are computed: the CPU unless ``device`` says otherwise; ``low_memory`` forces it.

        Raises:
            ConfigurationError: there is no such device, or ``low_memory`` forbids it.
        """
        name = str(self.converter.get("device", "cpu"))
        device = resolve_device("cpu" if name == "auto" and self.options["low_memory"] else name)
        if device.type != "cpu" and self.options["low_memory"]:
            raise ConfigurationError(
                f"low_memory computes on the CPU, so device={name!r} contradicts it", hint="drop one of them"
            )
        return device

    def streaming(self) -> StreamingOptions:
        """Return how weights are shared out between a device and the CPU.

        Raises:
            ConfigurationError: an unknown mode or threshold, or a bad value in the environment.
        """
        mode = self.options["streaming_mode"]
        variable = "STREAMING_AGGRESSIVENESS"
        named = os.environ.get(variable, "balanced")
        if named not in _AGGRESSIVENESS:
            raise ConfigurationError(
                f"the environment sets {variable}={named}, which is none of {', '.join(_AGGRESSIVENESS)}",
                hint=did_you_mean(named, _AGGRESSIVENESS) or f"unset {variable}",
            )
        if mode == _DEFAULT_STREAMING:
            mode = _AGGRESSIVENESS[named]
        overrides = self.options["streaming_thresholds"] or {}
        return StreamingOptions(mode, overrides, self.options["no_memory_limits"])

    def workers(self) -> int:
        """Return how many processes work on tensors on the CPU."""
        return int(self.converter.get("workers", 1))

    def layout(self) -> ComfyUILayout:
        """Return the layout of the output file."""
        return ComfyUILayout(
            full_precision_matrix_mult=self.options["full_precision_matrix_mult"],
            input_scale=self.options["include_input_scale"],
            header_metadata=self.options["save_quant_metadata"],
            legacy=not self.comfy_quant,
        )

    def recipe(self) -> Recipe:
        """Return the engine's recipe.

        Raises:
            ConfigurationError: an argument has a bad value.
        """
        self.check()
        self.streaming()
        options = self.options
        rounding = self._rounding()
        filters = validate_filters(self.filter_flags)
        rules = options["layer_config"]
        return Recipe(
            format=self._format(),
            rounding=rounding,
            # No flag means that nobody has said what the model is: then its names do.
            filters=filters or None,
            custom_layers=self._custom(rounding),
            exclude_layers=options["exclude_layers"],
            fallback=_named(options["fallback"], None, options["fallback_block_size"]),
            fallback_rounding=Nearest() if options["fallback_simple"] else rounding,
            skip_inefficient_layers=options["skip_inefficient_layers"],
            layer_config=LayerConfig.from_mapping(rules) if rules is not None else None,
            layer_config_fullmatch=options["layer_config_fullmatch"],
            loras=self._loras(),
            dampen_loras=options["merge_lora_dampen"],
        )

    def _format(self) -> Codec:
        mode = self.converter.get("scaling_mode", "row")
        size = self.converter.get("block_size")
        if self.options["fp16"]:
            return storage_format("fp16")
        if self.optimizer() == "quip":
            if "scaling_mode" in self.converter:
                raise ConfigurationError("with optimizer='quip' the quip_requant options choose the scales")
            return quip_format(self.options, size)
        if mode == "convrot":
            return storage_format("int8_convrot", size)
        if mode not in _SCALING_MODES:
            raise ConfigurationError(
                f"there is no scaling mode {mode!r}", hint=did_you_mean(str(mode), _SCALING_MODES)
            )
        return storage_format(f"int8_{mode}", size if mode == "block" else None)

    def _custom(self, rounding: Rounding | None) -> LayerOverride | None:
        options = self.options
        if options["custom_layers"] is None:
            return None
        wanted = _named(
            options["custom_type"] or "int8", options["custom_scaling_mode"], options["custom_block_size"]
        )
        assert wanted is not None
        chosen = Nearest() if options["custom_simple"] else rounding
        return LayerOverride(options["custom_layers"], wanted, chosen, options["custom_heur"])

    def _rounding(self) -> Rounding | None:
        method, settings = self.optimizer(), self._settings()
        data = self.options["calibration_data_path"] is not None
        if method == "none":
            if settings or data:
                name = next(iter(settings), "calibration_data_path")
                raise ConfigurationError(f"{name} belongs to learned rounding, which is switched off")
            return Nearest()
        settings.pop("optimizer", None)
        if method in COLUMNWISE:
            if settings:
                raise ConfigurationError(
                    f"{next(iter(settings))} belongs to learned rounding, not to optimizer={method!r}"
                )
            return columnwise_rounding(method, self.options)
        settings = {**_LEARNING, "seed": self.seed, **settings}
        return (
            learned_with_data(method, settings, self.options)
            if data
            else Learned(rounding_options(method, settings))
        )

    def _loras(self) -> tuple[LoraSource, ...]:
        single, several = self.options["merge_lora_path"], self.options["merge_lora_paths"]
        if single is not None and several:
            raise ConfigurationError("give merge_lora_path or merge_lora_paths, not both")
        paths = [single] if single is not None else list(several or ())
        return tuple(LoraSource(Path(path), self.options["merge_lora_scale"]) for path in paths)


def _named(kind: str | None, mode: str | None, block_size: int | None) -> Codec | None:
    """``"int8"`` with a scaling mode and block size, or any storage format by its own name."""
    if kind is None:
        return None
    if kind == "int8":
        mode = mode or ("block" if block_size else "row")
        if mode not in _SCALING_MODES:
            raise ConfigurationError(
                f"there is no scaling mode {mode!r}", hint=did_you_mean(mode, _SCALING_MODES)
            )
        kind = f"int8_{mode}"
    elif mode is not None:
        raise ConfigurationError(f"a scaling mode belongs to int8, not to {kind}")
    return storage_format(kind, block_size)
