"""What lies beside a model's weights and comes along: which files, and none that lead out of its folder.

A model folder may be anybody's. A symbolic link in it that leads elsewhere would put the contents of that
file, say a key of the user's, into a result that is published. So such links are left out with a warning,
and refused where a library would read them by their name (configuration, tokenizer, chat template). Weight
files that are quantized may be links: they are what the user pointed at, and only tensors come out of them.

The hub's cache is made of links from ``snapshots/<commit>/`` to ``blobs/`` two levels up, which are followed
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from qwodel.exceptions import ValidationError

__all__ = [
    "WEIGHT_SUFFIXES",
    "copy_side_files",
    "files_beside",
    "refuse_leading_out",
    "side_files",
    "stays_inside",
]

log = logging.getLogger(__name__)

WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".pt2", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
)
_REWRITTEN = frozenset({"config.json", "qwodel.manifest.json"})
_READ_BY_NAME = re.compile(
    r"config\.json|.*_config\.json|model_index\.json|tokenizer.*|.*\.(jinja|model|tiktoken)|chat_template.*|"
    r"special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|.*\.index\.json|modules\.json"
)


def side_files(root: Path, *, pipeline: bool = False, quantized: Collection[Path] = ()) -> dict[str, Path]:
    """Return what must come along, by relative path: everything but weights, indexes and hidden files.

    Args:
        root: a model directory.
        pipeline: it is that of a diffusers pipeline: every file of it comes along, ``config.json``,
            weights and indexes of the other models too.
        quantized: files that do not come along since their tensors are written anew.

    Raises:
        ValidationError: a file that is read by its name leads out of the folder.
    """
    found, left_out = _sorted_out(root, pipeline, quantized)
    if left_out:
        log.warning(
            "left out of the result, since they are links that lead out of the model's folder: %s",
            ", ".join(left_out[:5]) + (" …" if len(left_out) > 5 else ""),
        )
    return found


def files_beside(root: Path, quantized: Collection[Path] = ()) -> list[Path]:
    """Return configuration, indexes and side files of a model directory, or of a pipeline's: what a run reads.

    Raises:
        ValidationError: one that is read by its name leads out of the folder.
    """
    pipeline = (root / "model_index.json").is_file()
    found = set(_sorted_out(root, pipeline, quantized)[0].values())
    for path in root.glob("*.json"):
        if path.is_file() and _READ_BY_NAME.fullmatch(path.name):
            refuse_leading_out(path, root)
            found.add(path)
    return sorted(found)


def _sorted_out(root: Path, pipeline: bool, quantized: Collection[Path]) -> tuple[dict[str, Path], list[str]]:
    """What comes along, and what is left out for where it leads."""
    found: dict[str, Path] = {}
    left_out = []
    for relative, path in _files(root):
        if path in quantized or not (pipeline or _comes_along(root, relative)):
            continue
        if stays_inside(path, root):
            found[relative.as_posix()] = path
        elif path.suffix in WEIGHT_SUFFIXES or _READ_BY_NAME.fullmatch(path.name):
            refuse_leading_out(path, root)
        else:
            left_out.append(relative.as_posix())
    return found, left_out


def copy_side_files(files: Mapping[str, Path], target: Path) -> None:
    """Copy what :func:`side_files` found into ``target``, below the same relative paths."""
    for name, path in files.items():
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def stays_inside(path: Path, root: Path) -> bool:
    """Whether the file that ``path`` leads to lies in ``root``, or in the hub cache's blobs that belong to it."""
    real, home = path.resolve(), root.resolve()
    if real.is_relative_to(home):
        return True
    repository = home.parent.parent
    blobs = repository / "blobs"
    # A link in place of the folder of blobs would lead anywhere.
    cached = home.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink()
    return cached and real.parent == blobs


def refuse_leading_out(path: Path, root: Path) -> None:
    """Raise ValidationError where the file at ``path`` is a link out of ``root``."""
    if not stays_inside(path, root):
        raise ValidationError(
            f"{path} is a link that leads out of the model's folder, and what is there would be read as the model's",
            hint="put a copy of the file in its place, if that is what you want",
        )


def _files(root: Path) -> Iterator[tuple[Path, Path]]:
    """Yield (relative path, path) of all regular files, hidden ones left out; folders behind links are not entered."""
    for folder, folders, names in os.walk(root, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(root), path


def _comes_along(root: Path, relative: Path) -> bool:
    if relative.suffix in WEIGHT_SUFFIXES or relative.name.endswith(".index.json"):
        return False
    # Subdirectories of a model repository hold other packagings of the same weights.
    other_packaging = len(relative.parts) > 1 and _holds_weights(root / relative.parts[0])
    return not other_packaging and str(relative) not in _REWRITTEN


def _holds_weights(folder: Path) -> bool:
    return any(path.suffix in WEIGHT_SUFFIXES for path in folder.rglob("*"))
