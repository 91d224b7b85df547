"""Read a quantized GGUF back and compare it with what it was made from.

Names, shapes and every metadata value are compared with the intermediate (or the
source GGUF); sampled rows of every quantized tensor are decoded with the ``gguf``
package and compared by signal-to-quantization-noise ratio; tokenizer, special
tokens and chat template are compared with the Hugging Face files they came from.
Differences raise :class:`~qwodel.exceptions.IntegrityError`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwodel.backends.gguf.answers import LoadedModel
from qwodel.exceptions import IntegrityError
from qwodel.gguf_header import GGML_TYPES, GGUFArray, GGUFHeader, GGUFTensor
from qwodel.report import TensorQuality, decibels
from qwodel.untrusted import foreign_errors, kind_of, read_json, read_regular

__all__ = [
    "PROBE",
    "check_metadata",
    "check_tensors",
    "check_tokenization",
    "check_tokenizer",
    "decode_rows",
    "measure",
    "quality_of",
]

PROBE = "The quick brown fox jumps over 13 lazy dogs.\nCafé, naïve, 你好 🙂 — don't!"
"""Text with digits, a line break, accents, CJK, an emoji and a contraction: where tokenizers differ."""

_ROWS = 8
_FREE_KEYS = ("general.quantization_version", "general.file_type", "split.", "quantize.imatrix.")
_FLOOR_DB: Mapping[int, float] = {1: -1.0, 2: 0.0, 3: 6.0, 4: 11.0, 5: 17.0, 6: 22.0, 8: 30.0, 16: 45.0}
"""Least SQNR of a sound file by whole bits per weight, far below what any real tensor shows."""


def check_tensors(source: Iterable[GGUFHeader], output: GGUFHeader) -> None:
    """Raise unless ``output`` has exactly the source's tensors, in name and shape."""
    expected = {tensor.name: tensor for header in source for tensor in header.tensors.values()}
    for name in expected.keys() ^ output.tensors.keys():
        where = "lacks" if name in expected else "has, and the source lacks,"
        raise IntegrityError(f"the quantized file {where} the tensor {name}")
    for name, tensor in output.tensors.items():
        if tensor.shape != expected[name].shape:
            raise IntegrityError(f"{name} has shape {tensor.shape}, and {expected[name].shape} in the source")


def check_metadata(source: GGUFHeader, output: GGUFHeader) -> None:
    """Raise unless every metadata value of ``source`` is in ``output`` unchanged."""
    for key, value in source.metadata.items():
        if key.startswith(_FREE_KEYS):
            continue
        if key not in output.metadata:
            raise IntegrityError(f"the quantized file lost the metadata key {key}")
        if not _same(output.metadata[key], value):
            raise IntegrityError(f"the metadata value {key} changed in quantization")


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return first == second or (math.isnan(first) and math.isnan(second))
    return bool(first == second)


def check_tokenization(folder: Path, loaded: LoadedModel) -> str:
    """Compare llama.cpp's tokens of :data:`PROBE` with those of the source's tokenizer.

    Returns:
        ``"identical"``, ``"text survives"`` (other tokens, same text), or ``"not compared"``.

    Raises:
        IntegrityError: llama.cpp gives other tokens, and they do not spell the text.
    """
    expected = _reference_tokens(folder)
    if expected is None:
        return "not compared"
    if loaded["probe_tokens"] == expected:
        return "identical"
    if loaded["probe_text"].strip() == PROBE:
        return "text survives"
    raise IntegrityError(
        f"llama.cpp tokenizes otherwise than the source's tokenizer: {loaded['probe_text']!r} for {PROBE!r}",
        hint="the converter took the tokenizer for another kind; compare tokenizer_config.json with the original's",
    )


def _reference_tokens(folder: Path) -> list[int] | None:
    """Tokenize :data:`PROBE` with the library the source's tokenizer was made for."""
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        with foreign_errors(f"{folder / 'tokenizer.json'} is no tokenizer"):
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            return list(tokenizer.encode(PROBE, add_special_tokens=False).ids)
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        with foreign_errors(f"{folder / 'tokenizer.model'} is no tokenizer"):
            return list(SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(PROBE))
    return None


def check_tokenizer(folder: Path, output: GGUFHeader) -> dict[str, Any]:
    """Compare tokenizer, special tokens and chat template with the Hugging Face files in ``folder``.

    Returns:
        What was compared: ``vocabulary``, ``chat_template`` and the special tokens found.
    """
    metadata = output.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, GGUFArray):
        return {}
    names = tokens.decode()
    found: dict[str, Any] = {"vocabulary": len(names)}
    config = _json(folder / "tokenizer_config.json")
    with foreign_errors(f"{folder / 'tokenizer.json'} is no description of a tokenizer"):
        _check_vocabulary(_json(folder / "tokenizer.json"), names)
    for kind in ("bos", "eos"):
        number = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        text = _token_text(config.get(f"{kind}_token"))
        if text is None or number is None:
            continue
        # A chat model may end turns with a token that only its other files name.
        if names[number] != text and number not in _token_ids(folder, kind):
            raise IntegrityError(
                f"the {kind} token is {names[number]!r}, and {text!r} in tokenizer_config.json"
            )
        found[kind] = names[number]
    template = _template(folder, config)
    if template is not None:
        if metadata.get("tokenizer.chat_template") != template:
            raise IntegrityError("the chat template differs from the source's")
        found["chat_template"] = True
    return found


def _token_ids(folder: Path, kind: str) -> set[int]:
    """Return the ids that the model's and the generation configuration give for a special token."""
    ids: set[int] = set()
    for file in ("config.json", "generation_config.json"):
        value = _json(folder / file).get(f"{kind}_token_id")
        ids |= {value} if isinstance(value, int) else set(value) if isinstance(value, list) else set()
    return ids


def _check_vocabulary(tokenizer: Mapping[str, Any], names: list[str]) -> None:
    """Check ids against ``tokenizer.json`` where it holds a plain vocabulary of the same spelling."""
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        return
    # The converter may spell added tokens as they decode.
    added = {token.get("id") for token in tokenizer.get("added_tokens") or []}
    for text, number in model["vocab"].items():
        if number in added:
            continue
        if number >= len(names) or (names[number] != text and names[number] != text.replace("▁", " ")):
            got = names[number] if number < len(names) else "nothing"
            raise IntegrityError(f"token {number} is {got!r}, and {text!r} in tokenizer.json")


def _json(file: Path) -> dict[str, Any]:
    if kind_of(file) != "file":
        return {}
    content = read_json(file, constants=True)
    return content if isinstance(content, dict) else {}


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        with foreign_errors(f"{file} is no chat template"):
            return read_regular(file).decode("utf-8")
    template = config.get("chat_template")
    return template if isinstance(template, str) else None


def measure(source: Iterable[GGUFHeader], output: GGUFHeader) -> list[TensorQuality]:
    """Decode sampled rows of every re-typed tensor and compare them with the source's.

    Raises:
        IntegrityError: a tensor decodes to something that is not its source.
    """
    origin = {tensor.name: (header.path, tensor) for header in source for tensor in header.tensors.values()}
    measured: list[TensorQuality] = []
    for name, tensor in output.tensors.items():
        path, before = origin[name]
        if tensor.type == before.type or tensor.numel == 0:
            continue
        rows = _sample(tensor)
        decoded = decode_rows(output.path, tensor, rows)
        reference = decode_rows(path, before, rows)
        if decoded is None or reference is None:
            continue
        quality = quality_of(name, reference, decoded)
        measured.append(quality)
        floor = _floor(tensor.type)
        if not quality.sqnr_db >= floor:
            raise IntegrityError(
                f"{name} decodes to something else: {quality.sqnr_db:.1f} dB against its source, and {tensor.type} "
                f"gives at least {floor:.0f} dB"
            )
    return measured


def _floor(kind: str) -> float:
    _, block, size = next(entry for entry in GGML_TYPES.values() if entry[0] == kind)
    bits = int(8 * size / block)
    return max(value for limit, value in _FLOOR_DB.items() if limit <= bits)


def _sample(tensor: GGUFTensor) -> npt.NDArray[np.int64]:
    rows = tensor.numel // tensor.shape[-1]
    return np.unique(np.linspace(0, rows - 1, min(rows, _ROWS)).astype(np.int64))


def decode_rows(
    path: Path, tensor: GGUFTensor, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32] | None:
    """Decode ``rows`` (indices into the tensor flattened to 2-D) to float32 [rows, columns].

    Returns ``None`` for a type the ``gguf`` package cannot decode.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    row_bytes = tensor.nbytes * tensor.shape[-1] // tensor.numel
    data = np.memmap(path, np.uint8, "r", tensor.begin, (tensor.nbytes // row_bytes, row_bytes))
    try:
        kind = GGMLQuantizationType[tensor.type]
        raw = np.ascontiguousarray(data[rows])
        if tensor.type in ("F32", "F16"):
            return raw.view(np.float32 if tensor.type == "F32" else np.float16).astype(np.float32)
        return np.asarray(dequantize(raw, kind), np.float32).reshape(len(rows), -1)
    except (KeyError, NotImplementedError):
        return None


def quality_of(
    name: str, reference: npt.NDArray[np.float32], estimate: npt.NDArray[np.float32]
) -> TensorQuality:
    """Measure decoded values against their source's, of the same shape; sums are formed in fp64."""
    noise = float(np.square(reference - estimate, dtype=np.float64).sum())
    signal = float(np.square(reference, dtype=np.float64).sum())
    return TensorQuality(name, decibels(signal, noise), noise / max(reference.size, 1))
