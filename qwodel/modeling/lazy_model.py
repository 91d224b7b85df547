"""A transformers model whose weights stay in the checkpoint until a part of the model is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwodel.exceptions import ConfigurationError, ConversionError, DependencyError, ValidationError
from qwodel.extras import install_hint
from qwodel.model_config import read_config
from qwodel.modeling.empty_models import empty_transformers_model

__all__ = ["LazyModel", "WeightPart", "open_lazily"]


@dataclass(frozen=True, slots=True)
class WeightPart:
    """A checkpoint tensor that a parameter is made of.

    Attributes:
        key: its name in the checkpoint.
        pattern: the pattern of transformers' converter that takes it in, if one does.
        index: its place among the parts with the same pattern, such as the number of an expert.
    """

    key: str
    pattern: str | None = None
    index: int = 0


class LazyModel:
    """A model on the meta device, and what each of its parameters is made of.

    Args:
        model: built without weights; its buffers are real.
        keys: names of the checkpoint's tensors.
        read: returns the numbers of one tensor.
        dtype: what floating-point parameters are computed in.
        device: where the loaded parts live.
    """

    def __init__(
        self,
        model: Any,
        keys: Iterable[str],
        read: Callable[[str], torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self._read = read
        self._parts, self._converters = _parts(model, keys)

    def parts(self, parameter: str) -> tuple[WeightPart, ...]:
        """The checkpoint tensors that make up a parameter; none where it is tied or missing."""
        return self._parts.get(parameter, ())

    def read(self, key: str) -> torch.Tensor:
        """A checkpoint tensor in its own dtype."""
        return self._read(key)

    def load(
        self, module: nn.Module, prefix: str, replaced: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Give the parameters and persistent buffers of ``module`` (at ``prefix``) their values.

        Args:
            replaced: checkpoint tensors to take from here, such as de-quantized ones; only the
                parameters they are part of are loaded then.

        Raises:
            ConversionError: transformers cannot assemble a parameter from the checkpoint's tensors.
        """
        for name, owner in module.named_modules(prefix=prefix):
            self.load_own(owner, name, replaced)

    def load_own(
        self, module: nn.Module, prefix: str, replaced: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """:meth:`load` for what ``module`` itself holds, without its children."""
        for name, old in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            full = f"{prefix}.{name}" if prefix else name
            parts = self.parts(full)
            if not parts or (replaced is not None and not any(part.key in replaced for part in parts)):
                continue
            self._place(module, name, old, self._assemble(full, parts, replaced or {}, self.dtype))

    def assemble(self, parameter: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What transformers makes of ``tensors``, in their own dtype, in place of a parameter's parts.

        Args:
            tensors: by the parts' names, such as codes or scales of each expert.

        Raises:
            ConversionError: transformers cannot assemble them.
        """
        return self._assemble(parameter, self.parts(parameter), tensors, None)

    def unload(self, module: nn.Module) -> None:
        """Take the weights of ``module`` out of memory again."""
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                if parameter.device.type != "meta":
                    empty = torch.empty_like(parameter, device="meta")
                    _set_parameter(owner, name, empty)

    def _place(self, owner: nn.Module, name: str, old: torch.Tensor, value: torch.Tensor) -> None:
        if value.shape != old.shape:
            raise ConversionError(
                f"the checkpoint's {name} has shape {list(value.shape)}, the model wants {list(old.shape)}",
                hint="does config.json belong to these weights?",
            )
        value = value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
        if isinstance(old, nn.Parameter):
            _set_parameter(owner, name, value)
        else:
            owner.register_buffer(name, value)

    def _assemble(
        self,
        parameter: str,
        parts: tuple[WeightPart, ...],
        replaced: Mapping[str, torch.Tensor],
        dtype: torch.dtype | None,
    ) -> torch.Tensor:
        tensors = [replaced[part.key] if part.key in replaced else self._read(part.key) for part in parts]
        if parts[0].pattern is None:
            return tensors[0]
        converter = deepcopy(self._converters[parts[0].pattern])
        for part, tensor in zip(parts, tensors, strict=True):
            converter.add_tensor(parameter, part.key, part.pattern, tensor.to(dtype or tensor.dtype))
        try:
            made = converter.convert(parameter, model=self.model, config=self.model.config)
        except Exception as error:
            # Conversions are transformers' own code for each architecture and raise what they like.
            raise ConversionError(
                f"{parameter} cannot be assembled from {parts[0].key} …: {error}"
            ) from error
        found = made.get(parameter)
        if found is None:
            raise ConversionError(f"{parameter} is not among what transformers makes of {parts[0].key} …")
        result: torch.Tensor = found[0] if isinstance(found, list) else found
        return result


def _set_parameter(owner: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a parameter another value, past ``register_parameter``, which other libraries replace for all threads."""
    owner._parameters[name] = nn.Parameter(value, requires_grad=False)  # noqa: SLF001


def open_lazily(
    config: Mapping[str, Any],
    keys: Iterable[str],
    read: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LazyModel:
    """Build the architecture that ``config`` names, without its weights.

    Args:
        config: the content of ``config.json``.
        keys: names of the checkpoint's tensors.
        read: returns one of them.

    Raises:
        DependencyError: transformers is not installed.
        ValidationError: the configuration names no architecture.
        ConfigurationError: transformers does not know the architecture.
    """
    try:
        import transformers
    except ImportError as error:
        raise DependencyError(
            f"running a model needs {error.name}", hint=install_hint("calibrate")
        ) from error
    names = config.get("architectures") or []
    if not names:
        raise ValidationError("config.json names no architecture", hint="add architectures to it")
    cls = getattr(transformers, str(names[0]), None)
    if cls is None or ("auto_map" in config and not hasattr(transformers, str(names[0]))):
        raise ConfigurationError(
            f"transformers {transformers.__version__} has no architecture {names[0]}",
            hint="run the model yourself and collect statistics with qwodel.modeling.collect_statistics",
        )
    # Configuration classes change what they are given.
    plain = {key: deepcopy(value) for key, value in config.items() if key != "quantization_config"}
    settings = transformers.AutoConfig.for_model(plain.pop("model_type"), **plain)
    model = empty_transformers_model(cls, settings, dtype)
    model.eval()
    return LazyModel(model, keys, read, dtype, torch.device(device))


def _parts(model: Any, keys: Iterable[str]) -> tuple[dict[str, tuple[WeightPart, ...]], dict[str, Any]]:
    """What transformers' loader would make each parameter of, and its converters by pattern."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    wanted = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    prefix = model.base_model_prefix
    found: dict[str, list[WeightPart]] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name in wanted:
            parts = found.setdefault(name, [])
            index = sum(part.pattern == pattern for part in parts)
            parts.append(WeightPart(key, pattern, index))
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    return {name: tuple(parts) for name, parts in found.items()}, by_pattern


def config_of(directory: Path) -> dict[str, Any]:
    """The content of a model directory's ``config.json``.

    Raises:
        ValidationError: it is missing or no JSON object.
    """
    return dict(described(read_config(Path(directory)), directory))


def described(config: Mapping[str, Any], directory: Path) -> Mapping[str, Any]:
    """The ``config`` of a model directory, which must be there.

    Raises:
        ValidationError: it is empty.
    """
    if not config:
        raise ValidationError(f"{directory} has no config.json that describes a model")
    return config
