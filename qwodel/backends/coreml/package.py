"""What lies in and beside the package besides the program: descriptions, licence, tokenizer."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import Any

from qwodel.backends.base import Job
from qwodel.backends.coreml.build import Built
from qwodel.backends.coreml.formats import CoreMLRecipe
from qwodel.backends.coreml.options import CoreMLOptions
from qwodel.backends.coreml.toolchain import record_log
from qwodel.hashes import hash_outputs
from qwodel.side_files import copy_side_files, side_files, stays_inside
from qwodel.source import ModelSource
from qwodel.version import __version__

__all__ = ["copy_beside", "licence_of", "write_package"]


def write_package(
    model: Any, package: Path, job: Job[CoreMLOptions], recipe: CoreMLRecipe, built: Built
) -> None:
    """Describe coremltools' ``model`` and save it as ``package``: the same bytes for the same program.

    Descriptions of inputs and outputs, licence, source and recipe go in; the author is the user's to name.
    """
    _describe(model, job.source, recipe, built, job.options)
    with record_log():
        model.save(str(package))
    _settle_bytes(package)


def _settle_bytes(package: Path) -> None:
    """Take out of a package what differs from run to run: the order of maps, the day, random identifiers.

    The identifiers are made of what they stand for, as version 5 of RFC 9562's UUIDs.
    """
    from coremltools.proto import Model_pb2

    manifest = package / "Manifest.json"
    listed = json.loads(manifest.read_text("utf-8"))
    entries = listed["itemInfoEntries"]
    program = package / "Data" / entries[listed["rootModelIdentifier"]]["path"]
    spec = Model_pb2.Model.FromString(program.read_bytes())
    spec.description.metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    # coremltools makes this file and the folder of weights for their owner alone.
    program.unlink()
    (program.parent / "weights").chmod(program.parent.stat().st_mode)
    program.write_bytes(spec.SerializeToString(deterministic=True))
    names = {old: _identifier(package / "Data", entry["path"]) for old, entry in entries.items()}
    listed["itemInfoEntries"] = dict(sorted((names[old], entry) for old, entry in entries.items()))
    listed["rootModelIdentifier"] = names[listed["rootModelIdentifier"]]
    manifest.write_text(json.dumps(listed, indent=4) + "\n", "utf-8")


def _identifier(folder: Path, path: str) -> str:
    content = json.dumps(hash_outputs(folder / path), sort_keys=True)
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{path} {content}"))


def _describe(
    model: Any, source: ModelSource, recipe: CoreMLRecipe, built: Built, options: CoreMLOptions
) -> None:
    inputs = {each.name: each.description for each in built.inputs}
    outputs = {each.name: each.description for each in built.outputs}
    model.short_description = (
        f"{source.name} ({source.architecture or 'traced program'}), {recipe.describe()}"
    )
    licence = licence_of(source.path)
    if licence:
        model.license = licence
    for name in model.input_description:
        if name in inputs:
            model.input_description[name] = inputs[name]
    for name in model.output_description:
        if name in outputs:
            model.output_description[name] = outputs[name]
    facts = {
        "qwodel.version": __version__,
        "qwodel.source": source.given if source.revision else source.name,
        "qwodel.revision": source.revision or "",
        "qwodel.format": recipe.format,
        "qwodel.recipe": recipe.describe(),
        "qwodel.compute_units": options.compute_units,
        "qwodel.max_tokens": str(built.dimensions.longest or ""),
        "qwodel.stateful": "true" if options.stateful else "",
    }
    for key, value in facts.items():
        if value:
            model.user_defined_metadata[key] = value


def licence_of(path: Path) -> str | None:
    """Return the licence a model directory states: in its card's front matter, or its licence file's title."""
    if not path.is_dir():
        return None
    card = path / "README.md"
    if card.is_file() and stays_inside(card, path):
        text = card.read_text("utf-8", errors="replace")
        front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        stated = re.search(r"^license:\s*(\S+)\s*$", front[1], re.MULTILINE) if front else None
        if stated:
            return stated[1].strip("'\"")
    for file in sorted(path.glob("LICEN[SC]E*")):
        if not file.is_file() or not stays_inside(file, path):
            continue
        lines = [
            line.strip() for line in file.read_text("utf-8", errors="replace").splitlines() if line.strip()
        ]
        if lines:
            return " ".join(lines[:2]) if lines[0].lower().startswith("apache") else lines[0]
    return None


def copy_beside(source: ModelSource, folder: Path) -> list[str]:
    """Copy configuration, tokenizer, processor, chat template and licence; return their names."""
    if not source.path.is_dir():
        return []
    files = side_files(source.path)
    config = source.path / "config.json"
    if config.is_file() and stays_inside(config, source.path):
        files["config.json"] = config
    copy_side_files(files, folder)
    return sorted(files)
