"""Make trained models small: one :class:`Quantizer` over llama.cpp, llm-compressor, coremltools and native methods.

The public names load on first use (PEP 562), so ``import qwodel`` costs next to nothing.
"""

from __future__ import annotations

from qwodel.version import __version__

TYPE_CHECKING = False  # typing's own constant would cost as much as the whole interpreter's start
if TYPE_CHECKING:
    from typing import Any

    from qwodel.exceptions import (
        BackendNotFoundError,
        CalibrationError,
        Cancelled,
        ConfigurationError,
        ConversionError,
        DependencyError,
        FormatNotSupportedError,
        IntegrityError,
        QuantizationError,
        ResourceError,
        ValidationError,
    )
    from qwodel.quantizer import Quantizer, quantize

__all__ = [
    "BackendNotFoundError",
    "CalibrationError",
    "Cancelled",
    "ConfigurationError",
    "ConversionError",
    "DependencyError",
    "FormatNotSupportedError",
    "IntegrityError",
    "QuantizationError",
    "Quantizer",
    "ResourceError",
    "ValidationError",
    "__version__",
    "quantize",
]

_HOME = {name: "qwodel.exceptions" for name in __all__ if name.endswith("Error") or name == "Cancelled"}
_HOME |= {"Quantizer": "qwodel.quantizer", "quantize": "qwodel.quantizer"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qwodel' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
