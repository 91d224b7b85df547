"""Finding out which tensors of a checkpoint are codes, and how to read them as weights.

Every format that is written or read recognises its own; see :mod:`qwodel.checkpoint.formats.registry`.
Anything else that is quantized is refused: a code read as a number is a ruined model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.formats.cast import PlainDecoder
from qwodel.checkpoint.formats.registry import RECOGNISERS
from qwodel.checkpoint.formats.stated import FP8_DTYPES, StoredTensors
from qwodel.checkpoint.source.source_tensor import Sources, SourceTensor

__all__ = ["resolve_sources"]

_READABLE_METHODS = frozenset({"fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4", "modelopt"})
_FOREIGN = {
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "g_idx": "GPTQ", "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes", "nested_absmax": "bitsandbytes", "SCB": "bitsandbytes INT8",
    "weight_zero_point": "asymmetric compressed-tensors", "hadamard_quip": "QuIP with transformed storage",
    "smooth_factors": "SmoothQuant with external factors", "pre_quant_scale": "AWQ-scaled NVFP4",
}  # fmt: skip
_ACTIVATION_SCALES = ("input_scale", "scale_input", "activation_scale", "input_global_scale", "k_scale", "v_scale",
                      "output_scale", "input_activation_scale")  # fmt: skip


def resolve_sources(reader: UnifiedSafetensorsLoader, config: Mapping[str, Any] | None = None) -> Sources:
    """Pair every quantized tensor of ``reader`` with its scales.

    Args:
        reader: an open checkpoint.
        config: the model's ``config.json``, if there is one; its
            ``quantization_config`` settles block sizes and refuses early.

    Raises:
        ValidationError: the source is quantized in a way that is not understood.
    """
    stored = StoredTensors(reader, config or {})
    _refuse_foreign(stored)
    found: dict[str, SourceTensor] = {}
    used: dict[str, str] = {}
    for name in reader:
        if source := _encoded(stored, name):
            found[name] = source
            used |= dict.fromkeys(source.stored, source.name)
    dropped = _markers(stored, set(used.values()))
    tensors = []
    for name in reader:
        if name in found:
            tensors.append(found[name])
        elif name not in used and name not in dropped:
            entry = reader.entry(name)
            tensors.append(SourceTensor(name, entry.shape, entry.dtype, (name,)))
    _check_unscaled_fp8(stored, found, tensors)
    return Sources(tuple(tensors), dropped)


def _refuse_foreign(stored: StoredTensors) -> None:
    method = stored.stated.method
    if method and method not in _READABLE_METHODS:
        raise stored.refusal(f"{method} (config.json)")
    for name in stored.reader:
        suffix = name.rpartition(".")[2]
        if suffix in _FOREIGN:
            raise stored.refusal(f"{_FOREIGN[suffix]} (tensor {name!r})")
        if "quant_state" in name:
            raise stored.refusal(f"bitsandbytes (tensor {name!r})")


def _encoded(stored: StoredTensors, name: str) -> SourceTensor | None:
    """The weight whose codes this tensor holds, if it holds any."""
    for recognise in RECOGNISERS:
        if found := recognise(stored, name):
            dtype = found.dtype or stored.stated.dtype
            return SourceTensor(found.name, found.shape, dtype, found.stored, found.decoder, found.encoding)
    dtype, description = stored.reader.entry(name).dtype, stored.description(name)
    if dtype not in FP8_DTYPES and (description or stored.scale_of(name)):
        raise stored.refusal(f"{description.get('format', 'scaled ' + dtype)} (tensor {name!r})")
    if name.endswith(".weight_packed"):
        raise stored.refusal(f"packed {dtype} codes of an unknown format (tensor {name!r})")
    return None


def _markers(stored: StoredTensors, encoded: set[str]) -> dict[str, str]:
    """Tensors that belong to the source's quantization and to no weight's numbers."""
    dropped = {}
    for name in stored.reader:
        layer, _, suffix = name.rpartition(".")
        if name == "scaled_fp8" or suffix == "comfy_quant":
            dropped[name] = "marker of the source's quantization"
        elif (
            suffix in _ACTIVATION_SCALES
            and encoded
            and (f"{layer}.weight" in encoded or suffix in ("k_scale", "v_scale"))
        ):
            dropped[name] = "activation scale of the source's quantization"
        elif suffix == "weight_shape" and f"{layer}.weight" in encoded:
            dropped[name] = "shape of a packed weight"
    return dropped


def _check_unscaled_fp8(
    stored: StoredTensors, found: Mapping[str, SourceTensor], tensors: list[SourceTensor]
) -> None:
    """FP8 without scales is a plain cast, unless scales belong to other tensors of the same checkpoint."""
    bare = {each.name for each in tensors if each.decoder is None and each.dtype in FP8_DTYPES}
    if not bare:
        return
    if stored.stated.config or any(each.encoding.startswith("FP8") for each in found.values()):
        raise stored.refusal(f"FP8 whose scale is missing (tensor {min(bare)!r})")
    for index, each in enumerate(tensors):
        if each.name in bare:
            decoder = PlainDecoder(each.name)
            tensors[index] = SourceTensor(
                each.name, each.shape, stored.stated.dtype, each.stored, decoder, "FP8 cast"
            )
