"""Finding out which tensors of a checkpoint are codes, and how to read them as weights.

Understood: FP8 and INT8 with tensor, row or block scales (``weight_scale``,
``weight_scale_inv``, ``scale_weight``), MXFP4 as gpt-oss stores it, NVFP4 as
ModelOpt, compressed-tensors and ComfyUI store it. Anything else that is
quantized is refused: a code read as a number is a ruined model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qwodel.checkpoint.files.dtypes import FLOAT_DTYPES
from qwodel.checkpoint.files.reader import UnifiedSafetensorsLoader
from qwodel.checkpoint.source.source_decoders import (
    Mxfp4Decoder,
    NvFp4Decoder,
    PackedInt8Decoder,
    PlainDecoder,
    QuipDecoder,
    RotatedDecoder,
    ScaledDecoder,
)
from qwodel.checkpoint.source.source_tensor import Sources, SourceTensor
from qwodel.checkpoint.source.stated_quantization import StatedQuantization
from qwodel.exceptions import ValidationError

__all__ = ["resolve_sources"]

_CONVROT_DEFAULT = 256
_CONVROT_SIZES = (4, 16, 64, 256, 1024)
_FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_BLOCK_SIZES = (128, 64, 32, 16, 256)
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
    return _Resolver(reader, config or {}).resolve()


class _Resolver:
    def __init__(self, reader: UnifiedSafetensorsLoader, config: Mapping[str, Any]) -> None:
        self.reader = reader
        self.stated = StatedQuantization.of(reader, config)
        self.used: dict[str, str] = {}

    def resolve(self) -> Sources:
        self._refuse_foreign()
        found: dict[str, SourceTensor] = {}
        for name in self.reader:
            if source := self._encoded(name):
                found[name] = source
                self.used.update(dict.fromkeys(source.stored, source.name))
        dropped = self._markers()
        tensors = []
        for name in self.reader:
            if name in found:
                tensors.append(found[name])
            elif name not in self.used and name not in dropped:
                entry = self.reader.entry(name)
                tensors.append(SourceTensor(name, entry.shape, entry.dtype, (name,)))
        self._check_unscaled_fp8(found, tensors)
        return Sources(tuple(tensors), dropped)

    def _refuse_foreign(self) -> None:
        method = self.stated.method
        if method and method not in _READABLE_METHODS:
            raise _refusal(self.reader, f"{method} (config.json)")
        for name in self.reader:
            suffix = name.rpartition(".")[2]
            if suffix in _FOREIGN:
                raise _refusal(self.reader, f"{_FOREIGN[suffix]} (tensor {name!r})")
            if "quant_state" in name:
                raise _refusal(self.reader, f"bitsandbytes (tensor {name!r})")
            if (
                suffix == "weight_packed"
                and self.reader.entry(name).dtype != "U8"
                and not self._packs_int8(name)
            ):
                raise _refusal(self.reader, f"packed integers (tensor {name!r})")

    def _encoded(self, name: str) -> SourceTensor | None:
        entry = self.reader.entry(name)
        layer = name.removesuffix(".weight")
        comfyui = self.stated.comfyui.get(layer, {}) if name.endswith(".weight") else {}
        if name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in self.reader:
            return self._mxfp4(name)
        if entry.dtype == "U8" and len(entry.shape) == 2 and (nvfp4 := self._nvfp4(name, comfyui)):
            return nvfp4
        if name.endswith(".weight_packed") and entry.dtype == "I32":
            return self._packed_int8(name)
        scale = self._scale_of(name)
        if entry.dtype in _FP8:
            kind = entry.dtype.replace("F8_", "FP8 ")
            return self._scaled(name, scale, kind) if scale else None
        if entry.dtype == "I8" and scale:
            plain = self._scaled(name, scale, "INT8")
            if comfyui.get("format") == "int8_quip":
                return self._quip(plain, layer)
            return self._rotated(plain, comfyui) if comfyui.get("convrot") else plain
        if scale or comfyui:
            raise _refusal(self.reader, f"{comfyui.get('format', 'scaled ' + entry.dtype)} (tensor {name!r})")
        return None

    def _packs_int8(self, name: str) -> bool:
        stem = name.removesuffix("_packed")
        parts = (f"{stem}_scale", f"{stem}_shape")
        return self.stated.packs_int8 and all(part in self.reader for part in parts)

    def _packed_int8(self, name: str) -> SourceTensor:
        stem = name.removesuffix("_packed")
        rows, words = self.reader.get_shape(name)
        shape = (rows, 4 * words)
        if tuple(self.reader.get_tensor(f"{stem}_shape").tolist()) != shape:
            raise _refusal(self.reader, f"packed INT8 of an unknown layout (tensor {name!r})")
        block = self._block(stem, shape, self.reader.get_shape(f"{stem}_scale"))
        decoder = PackedInt8Decoder(name, f"{stem}_scale", block)
        return SourceTensor(stem, shape, self.stated.dtype, (name, f"{stem}_scale"), decoder, "packed INT8")

    def _rotated(self, plain: SourceTensor, comfyui: Mapping[str, Any]) -> SourceTensor:
        size = comfyui.get("convrot_groupsize", _CONVROT_DEFAULT)
        columns = plain.shape[1]
        if not isinstance(size, int) or size not in _CONVROT_SIZES or columns % size:
            raise _refusal(self.reader, f"INT8 rotated in groups of {size} (tensor {plain.name!r})")
        assert isinstance(plain.decoder, ScaledDecoder)
        return replace(plain, decoder=RotatedDecoder(plain.decoder, size), encoding="INT8 ConvRot")

    def _quip(self, plain: SourceTensor, layer: str) -> SourceTensor:
        signs = (f"{layer}.quip_signs_out", f"{layer}.quip_signs_in")
        shapes = [(self.reader.get_shape(name) if name in self.reader else ()) for name in signs]
        rows, columns = plain.shape
        if shapes != [(rows,), (columns,)]:
            raise _refusal(self.reader, f"QuIP without the signs of its rotations (tensor {plain.name!r})")
        assert isinstance(plain.decoder, ScaledDecoder)
        decoder = QuipDecoder(plain.decoder, (rows, columns), *signs)
        return replace(plain, decoder=decoder, stored=(*plain.stored, *signs), encoding="INT8 QuIP")

    def _scale_of(self, name: str) -> str | None:
        stem = name.removesuffix(".weight")
        candidates = [f"{name}_scale", f"{name}_scale_inv"]
        if stem != name:
            candidates.append(f"{stem}.scale_weight")
        present = [each for each in candidates if each in self.reader]
        if len(present) > 1:
            raise _refusal(self.reader, f"two scales for {name!r}: {', '.join(present)}")
        return present[0] if present else None

    def _scaled(self, name: str, scale: str, kind: str) -> SourceTensor:
        entry, scales = self.reader.entry(name), self.reader.entry(scale)
        if scales.dtype not in FLOAT_DTYPES and scales.dtype != "F8_E8M0":
            raise _refusal(self.reader, f"{kind} with {scales.dtype} scales (tensor {scale!r})")
        block = self._block(name, entry.shape, scales.shape)
        shared = "tensor" if scales.numel == 1 else "row" if block[1:] == entry.shape[1:] else "block"
        return SourceTensor(
            name,
            entry.shape,
            self.stated.dtype,
            (name, scale),
            ScaledDecoder(name, scale, block),
            f"{kind} {shared}",
        )

    def _block(self, name: str, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
        """Codes per scale along each dimension, or a refusal where shapes leave a doubt."""
        if all(n == 1 for n in scales):
            return tuple(max(n, 1) for n in shape)
        if len(scales) == 1 and len(shape) == 2 and scales[0] == shape[0]:
            return (1, shape[1])
        if len(scales) != len(shape):
            raise _refusal(self.reader, f"{name!r} {list(shape)} with scales {list(scales)}")
        given = self.stated.block(name)
        if len(given) == 2 and len(shape) >= 2:
            wanted = tuple(-(-n // size) for n, size in zip(shape[-2:], given, strict=True))
            if tuple(scales[-2:]) == wanted and tuple(scales[:-2]) == tuple(shape[:-2]):
                return (*(1 for _ in shape[:-2]), *(int(size) for size in given))
        return tuple(self._block_size(name, n, count) for n, count in zip(shape, scales, strict=True))

    def _block_size(self, name: str, length: int, count: int) -> int:
        if count in (1, length):
            return length // count if count else 1
        sizes = [size for size in _BLOCK_SIZES if -(-length // size) == count]
        if len(sizes) != 1:
            raise ValidationError(
                f"{name!r}: {count} scales for {length} weights fit "
                f"{'several block sizes' if sizes else 'no known block size'}",
                hint="keep the model's config.json with its quantization_config beside the weights",
            )
        return sizes[0]

    def _mxfp4(self, name: str) -> SourceTensor:
        scales = name.removesuffix("_blocks") + "_scales"
        blocks, exponents = self.reader.entry(name), self.reader.entry(scales)
        if (
            (blocks.dtype, exponents.dtype) != ("U8", "U8")
            or len(blocks.shape) != 4
            or (blocks.shape[:3] != exponents.shape or blocks.shape[3] != 16)
        ):
            raise _refusal(self.reader, f"blocks of an unknown layout (tensor {name!r})")
        experts, rows, groups, _ = blocks.shape
        return SourceTensor(
            name.removesuffix("_blocks"), (experts, groups * 32, rows), "BF16", (name, scales),
            Mxfp4Decoder(name, scales), "MXFP4",
        )  # fmt: skip

    def _nvfp4(self, name: str, comfyui: Mapping[str, Any]) -> SourceTensor | None:
        stem = name.removesuffix("_packed")
        scales = f"{stem}_scale"
        divides = stem != name
        factor = f"{stem}_global_scale" if divides else f"{stem}_scale_2"
        if (
            scales not in self.reader
            or factor not in self.reader
            or self.reader.entry(scales).dtype != "F8_E4M3"
        ):
            return None
        rows, half = self.reader.get_shape(name)
        shape = (rows, half * 2)
        swizzled = comfyui.get("format") == "nvfp4"
        expected = (-(-rows // 128) * 128, -(-half // 32) * 4) if swizzled else (rows, half // 8)
        original = tuple(comfyui.get("orig_shape") or shape)
        if self.reader.get_shape(scales) != expected or original != shape:
            raise _refusal(self.reader, f"NVFP4 of an unknown layout (tensor {name!r})")
        decoder = NvFp4Decoder(name, scales, factor, shape, divides, swizzled)
        return SourceTensor(stem, shape, self.stated.dtype, (name, scales, factor), decoder, "NVFP4")

    def _markers(self) -> dict[str, str]:
        encoded = set(self.used.values())
        dropped = {}
        for name in self.reader:
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

    def _check_unscaled_fp8(self, found: Mapping[str, SourceTensor], tensors: list[SourceTensor]) -> None:
        """FP8 without scales is a plain cast, unless scales belong to other tensors of the same checkpoint."""
        bare = {each.name for each in tensors if each.decoder is None and each.dtype in _FP8}
        if not bare:
            return
        if self.stated.config or any(each.encoding.startswith("FP8") for each in found.values()):
            raise _refusal(self.reader, f"FP8 whose scale is missing (tensor {min(bare)!r})")
        for index, each in enumerate(tensors):
            if each.name in bare:
                tensors[index] = SourceTensor(
                    each.name, each.shape, self.stated.dtype, each.stored, PlainDecoder(each.name), "FP8 cast"
                )


def _refusal(reader: UnifiedSafetensorsLoader, what: str) -> ValidationError:
    return ValidationError(
        f"{reader.path} is already quantized in a form that cannot be decoded: {what}",
        hint="quantize the original, unquantized checkpoint",
    )
