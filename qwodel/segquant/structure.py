"""The structure of quantized layers as JSON: all but their tensors, and layers built from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from qwodel.algorithms.quant_types import FP8_E4M3, FP8_E5M2, INT4, INT6, INT8, INT16, QuantType
from qwodel.exceptions import ValidationError
from qwodel.modules.input_rounding import InputFormat, InputRounding
from qwodel.modules.quantized_conv import ConvGeometry, QuantizedConv
from qwodel.modules.segment_linear import SegmentLinear, SegmentProduct
from qwodel.modules.weight_codes import WeightCodes

__all__ = ["FORMAT", "QUANT_METHOD", "built_layer", "structure_of"]

QUANT_METHOD = "segquant"
"""The ``quant_method`` of configurations: diffusers refuses it, rather than take codes for weights."""

FORMAT = 1
"""Version of the structure's JSON."""

_TYPES = {each.name: each for each in (INT4, INT6, INT8, INT16, FP8_E4M3, FP8_E5M2)}


def structure_of(model: nn.Module) -> dict[str, Any]:
    """What the quantized layers of a model are made of, for JSON: all but their tensors."""
    layers = {
        name: _describe(module)
        for name, module in model.named_modules()
        if isinstance(module, SegmentLinear | QuantizedConv)
    }
    return {"quant_method": QUANT_METHOD, "format": FORMAT, "layers": layers}


def _describe(layer: SegmentLinear | QuantizedConv) -> dict[str, Any]:
    common = {
        "bias": None if layer.bias is None else _name_of(layer.bias.dtype),
        "real": layer.real,
        "dtype": _name_of(layer.dtype),
    }
    if isinstance(layer, QuantizedConv):
        return {
            "kind": "conv",
            "geometry": asdict(layer.geometry),
            "inputs": _inputs(layer.inputs),
            "weight": _weight(layer.weight_codes),
            **common,
        }
    parts = [
        {
            "inputs": _inputs(part.inputs),
            "weight": _weight(part.weight),
            "smoothed": part.smoothing is not None,
            "rank": 0 if part.down is None else len(part.down),
            "branch": None if part.down is None else _name_of(part.down.dtype),
        }
        for part in layer.products()
    ]
    return {"kind": "linear", "parts": parts, **common}


def _inputs(rounding: InputRounding) -> dict[str, Any]:
    form = rounding.form
    return {
        **asdict(form),
        "quant_type": None if form.quant_type is None else form.quant_type.name,
        "dtype": None if form.dtype is None else _name_of(form.dtype),
        "sizes": rounding.sizes,
    }


def _weight(weight: WeightCodes) -> dict[str, Any]:
    return {
        "shape": weight.shape,
        "quant_type": None if weight.quant_type is None else weight.quant_type.name,
        "dtype": None if weight.quant_type is not None else _name_of(weight.codes.dtype),
        "sizes": weight.sizes,
        "asymmetric": weight.zero_point is not None,
    }


def built_layer(described: Mapping[str, Any]) -> SegmentLinear | QuantizedConv:
    """A layer without tensors from its entry in :func:`structure_of`: they are on the meta device."""
    dtype = _dtype(described["dtype"])
    options: dict[str, Any] = {"real": described["real"], "dtype": dtype}
    if described["kind"] == "conv":
        geometry: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in described["geometry"].items()
        }
        weight = _built_weight(described["weight"])
        bias = _empty_bias(described["bias"], weight.shape[0])
        return QuantizedConv(
            _built_inputs(described["inputs"]), weight, bias, ConvGeometry(**geometry), **options
        )
    parts = []
    for each in described["parts"]:
        weight = _built_weight(each["weight"])
        rows, columns = weight.shape
        branch = None if each["branch"] is None else _dtype(each["branch"])
        parts.append(
            SegmentProduct(
                _built_inputs(each["inputs"]),
                weight,
                smoothing=torch.empty(columns, dtype=torch.float32, device="meta")
                if each["smoothed"]
                else None,
                down=torch.empty(each["rank"], columns, dtype=branch, device="meta") if branch else None,
                up=torch.empty(rows, each["rank"], dtype=branch, device="meta") if branch else None,
            )
        )
    bias = _empty_bias(described["bias"], sum(part.weight.shape[0] for part in parts))
    return SegmentLinear(parts, bias, **options)


def _empty_bias(dtype: str | None, rows: int) -> torch.Tensor | None:
    return None if dtype is None else torch.empty(rows, dtype=_dtype(dtype), device="meta")


def _built_inputs(described: Mapping[str, Any]) -> InputRounding:
    fields = {key: value for key, value in described.items() if key != "sizes"}
    fields["quant_type"] = _type(fields["quant_type"])
    fields["dtype"] = None if fields["dtype"] is None else _dtype(fields["dtype"])
    return InputRounding(InputFormat(**fields), tuple(described["sizes"]), device="meta")


def _built_weight(described: Mapping[str, Any]) -> WeightCodes:
    rows, columns = described["shape"]
    return WeightCodes(
        (rows, columns),
        _type(described["quant_type"]),
        tuple(described["sizes"]),
        dtype=torch.float32 if described["dtype"] is None else _dtype(described["dtype"]),
        asymmetric=described["asymmetric"],
        device="meta",
    )


def _type(name: str | None) -> QuantType | None:
    return None if name is None else _TYPES[name]


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValidationError(f"{name!r} is no dtype")
    return found
