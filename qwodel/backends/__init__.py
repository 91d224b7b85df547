"""The registry: a backend's name → where its adapter lives, loaded on use.

Other packages add backends through the entry-point group ``qwodel.backends``::

    [project.entry-points."qwodel.backends"]
    mine = "my_package.adapter:MyQuantizer"
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module, util
from typing import TYPE_CHECKING, Any, NamedTuple

from qwodel.exceptions import BackendNotFoundError, DependencyError, did_you_mean
from qwodel.extras import install_hint

if TYPE_CHECKING:
    from qwodel.backends.base import BaseQuantizer

__all__ = ["ENTRY_POINT_GROUP", "backend_names", "is_available", "load_backend", "missing_packages"]

ENTRY_POINT_GROUP = "qwodel.backends"


class _Builtin(NamedTuple):
    target: str
    extra: str
    requires: Mapping[str, str]
    """Import name → name on PyPI of what the backend cannot do without."""


_TORCH = {"torch": "torch"}
_IN_STEP = {"greenlet": "greenlet", **_TORCH}
_TRANSFORMERS = {**_TORCH, "transformers": "transformers"}
_BUILTIN: Mapping[str, _Builtin] = {
    "awq": _Builtin("qwodel.backends.awq:AWQQuantizer", "awq", {"llmcompressor": "llmcompressor", **_TRANSFORMERS}),
    "coreml": _Builtin("qwodel.backends.coreml.adapter:CoreMLQuantizer", "coreml", {"coremltools": "coremltools", **_TRANSFORMERS}),
    "fp8": _Builtin("qwodel.backends.fp8:FP8Quantizer", "fp8", _IN_STEP),
    "gguf": _Builtin(
        "qwodel.backends.gguf.adapter:GGUFQuantizer",
        "gguf",
        {"llama_cpp": "llama-cpp-python", "gguf": "gguf", "sentencepiece": "sentencepiece", **_TRANSFORMERS},
    ),
    "int8": _Builtin("qwodel.backends.int8:INT8Quantizer", "int8", _IN_STEP),
    "segquant": _Builtin("qwodel.backends.segquant:SegQuantQuantizer", "segquant", {"diffusers": "diffusers", **_IN_STEP}),
    "smoothquant": _Builtin("qwodel.backends.smoothquant:SmoothQuantQuantizer", "smoothquant", {**_IN_STEP, **_TRANSFORMERS}),
}  # fmt: skip


def backend_names() -> list[str]:
    """Return every backend's name, installed or not, sorted."""
    return sorted({*_BUILTIN, *_entry_points()})


def missing_packages(name: str) -> list[str]:
    """Return the PyPI names of what backend ``name`` needs and is not installed."""
    builtin = _BUILTIN.get(name)
    if builtin is None:
        return []
    return [package for module, package in builtin.requires.items() if util.find_spec(module) is None]


def is_available(name: str) -> bool:
    """Whether this release has an adapter for ``name`` (its dependencies may still be missing)."""
    builtin = _BUILTIN.get(name)
    return builtin is None or util.find_spec(builtin.target.partition(":")[0]) is not None


def load_backend(name: str, *, check_dependencies: bool = True) -> type[BaseQuantizer[Any]]:
    """Import and return the adapter class of backend ``name`` (in any case).

    Raises:
        BackendNotFoundError: no backend has that name, or this release has no adapter for it.
        DependencyError: its pip extra is not installed.
    """
    key = name.strip().lower()
    external = _entry_points()
    if key in external:
        return _load_entry_point(external[key])
    if key not in _BUILTIN:
        raise BackendNotFoundError(
            f"there is no backend {name!r}",
            hint=did_you_mean(key, backend_names()) or f"known backends: {', '.join(backend_names())}",
        )
    builtin = _BUILTIN[key]
    if check_dependencies and (missing := missing_packages(key)):
        raise DependencyError(
            f"the {key} backend needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            hint=install_hint(builtin.extra),
        )
    if not is_available(key):
        ready = [other for other in _BUILTIN if is_available(other)]
        raise BackendNotFoundError(
            f"this release of qwodel has no adapter for the {key} backend yet",
            hint=f"ready: {', '.join(ready)}",
        )
    module, _, attribute = builtin.target.partition(":")
    adapter: type[BaseQuantizer[Any]] = getattr(import_module(module), attribute)
    return adapter


@cache
def _entry_points() -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {point.name.lower(): point for point in entry_points(group=ENTRY_POINT_GROUP)}


def _load_entry_point(point: Any) -> type[BaseQuantizer[Any]]:
    from qwodel.backends.base import BaseQuantizer

    try:
        adapter = point.load()
    except ImportError as error:
        raise DependencyError(
            f"backend {point.name!r} ({point.value}) cannot be imported: {error}"
        ) from error
    if not (isinstance(adapter, type) and issubclass(adapter, BaseQuantizer)):
        raise BackendNotFoundError(
            f"entry point {point.name!r} ({point.value}) is not a subclass of qwodel.backends.base.BaseQuantizer"
        )
    return adapter
