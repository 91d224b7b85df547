"""Which files of a path hold weights, and of which kind of input they are."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from qwodel.exceptions import IntegrityError, ValidationError
from qwodel.safetensors_files import checkpoint_files
from qwodel.untrusted import foreign_errors, kind_of, open_regular

__all__ = ["TRAINING_FILES", "denoiser_folder", "find_weights"]

_FILE_FORMATS = {
    ".safetensors": "safetensors",
    ".gguf": "gguf",
    ".pt": "pytorch",
    ".pth": "pytorch",
    ".bin": "pytorch",
    ".pt2": "exported",
}
TRAINING_FILES = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin"})
"""What transformers' Trainer leaves beside the weights."""

_DENOISERS = ("transformer", "unet", "prior")


def denoiser_folder(path: Path) -> Path | None:
    """Return the folder of the model that a diffusers pipeline samples with, or ``None`` for anything else."""
    if not path.is_dir() or kind_of(path / "model_index.json") != "file":
        return None
    return next((path / name for name in _DENOISERS if (path / name).is_dir()), None)


def find_weights(path: Path) -> tuple[str, list[Path]]:
    """Return the kind of input at an existing path, and its weight files in order.

    Raises:
        ValidationError: it holds no weights, or several models.
        IntegrityError: an archive is damaged.
    """
    if path.is_file():
        kind = _FILE_FORMATS.get(path.suffix.lower())
        if kind is None:
            raise ValidationError(
                f"{path} is no model file this library knows",
                hint=f"known endings: {', '.join(_FILE_FORMATS)}",
            )
        return _program_kind(path) or kind, _splits(path) if kind == "gguf" else [path]
    for suffix in (".safetensors", ".bin"):
        files = [file for file in checkpoint_files(path, suffix) if _holds_weights(file)]
        if files:
            return "huggingface", files
    content = _listed(path)
    loose = [file for file in content if file.suffix in (".gguf", ".pt", ".pth", ".pt2")]
    if len(loose) == 1 or (loose and loose == _splits(loose[0])):
        return _program_kind(loose[0]) or _FILE_FORMATS[loose[0].suffix], loose
    if loose:
        raise ValidationError(
            f"{path} holds several models: {', '.join(file.name for file in loose[:4])}",
            hint="give the path of one of these files",
        )
    raise ValidationError(
        f"{path} holds no model weights ({'it is empty' if not content else 'no .safetensors, .bin, .gguf or .pt'})",
        hint="give the directory that has config.json and the weight files in it",
    )


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ValidationError(f"{folder} cannot be listed: {error.strerror}") from error


def _program_kind(file: Path) -> str | None:
    """Tell archives that hold code from those that hold tensors alone, by the names in them."""
    if file.suffix.lower() not in (".pt", ".pth", ".pt2"):
        return None
    with open_regular(file) as stream, foreign_errors(f"{file} is damaged", error=IntegrityError):
        if not zipfile.is_zipfile(stream):
            return None
        with zipfile.ZipFile(stream) as archive:
            inner = {name.partition("/")[2] for name in archive.namelist()}
    if any(name.startswith("code/") for name in inner):
        return "torchscript"
    return "exported" if "models/model.json" in inner else None


def _splits(file: Path) -> list[Path]:
    """Return every part of the split GGUF model ``file`` is part of (llama.cpp's naming), or itself."""
    match = re.fullmatch(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", file.name, re.DOTALL)
    if match is None:
        return [file]
    number, count = int(match[2]), int(match[3])
    if not 1 <= number <= count:
        raise ValidationError(f"{file} is named part {number} of {count}", hint="give it another name")
    names = [f"{match[1]}-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1)]
    present = {other.name for other in _listed(file.parent)}
    missing = [name for name in names if name not in present]
    if missing:
        raise ValidationError(
            f"{file} is one of {count} parts, and {', '.join(missing[:3])} {'is' if len(missing) == 1 else 'are'} missing",
            hint="download the missing parts into the same folder",
        )
    return [file.with_name(name) for name in names]


def _holds_weights(file: Path) -> bool:
    return file.name not in TRAINING_FILES
