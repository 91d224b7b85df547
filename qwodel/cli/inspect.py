"""``qwodel inspect``: what a model is, from its headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qwodel.cli.arguments import JsonFlag
from qwodel.display import shown

__all__ = ["inspect"]


def inspect(
    model: Annotated[str, typer.Argument(help="A model directory, a model file, or a hub id (owner/name).")],
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor with dtype and shape.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash the files of a result and compare them with its manifest.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar="HF_TOKEN", show_envvar=False, help="Hugging Face token [env: HF_TOKEN]."),
    ] = None,
    json_: JsonFlag = False,
) -> None:
    """Show architecture, parameters, dtypes and size; reads headers only, downloads no weights.

    Beside a result of qwodel its manifest is looked at too: whether it is of these files, by their sizes,
    or with --verify by their hashes.
    """
    from qwodel.cli.report import human_bytes, print_json, print_table, say
    from qwodel.hub import HubModel, looks_like_hub_id
    from qwodel.source import inspect_source
    from qwodel.untrusted import checked_path, kind_of

    if looks_like_hub_id(model) and kind_of(checked_path(model)) is None:
        facts: dict[str, Any] = HubModel(model, revision, token).describe()
        listed: list[dict[str, Any]] = facts.pop("tensor_list")
    else:
        manifest = _manifest(checked_path(model), verify)
        source = inspect_source(model)
        facts = source.describe() | manifest
        listed = [{"name": n, "dtype": t.dtype, "shape": list(t.shape)} for n, t in source.tensors.items()]
    if json_:
        print_json({**facts, "tensor_list": listed} if tensors else facts)
        return
    for key, value in facts.items():
        text = value
        if key == "weight_bytes":
            text = human_bytes(value)
        elif key == "parameters" and value is not None:
            text = f"{value:,}"
        elif key == "dtypes":
            text = ", ".join(f"{kind} {count:,}" for kind, count in value.items())
        elif isinstance(value, list):
            text = ", ".join(map(shown, value[:4])) + (f" … ({len(value)} files)" if len(value) > 4 else "")
        if text is not None:
            say(f"{key.replace('_', ' ') + ':':<18} {text}")
    if tensors:
        print_table(["tensor", "dtype", "shape"], [(t["name"], t["dtype"], t["shape"]) for t in listed])


def _manifest(path: Path, verify: bool) -> dict[str, Any]:
    """What the manifest of a result says of its files, and whether it is so."""
    from qwodel.exceptions import IntegrityError, ValidationError
    from qwodel.hashes import check_outputs, stated_outputs

    found = stated_outputs(path)
    if found is None:
        if verify:
            raise ValidationError(f"{path} has no manifest with hashes to compare with")
        return {}
    manifest, outputs = found
    problems = check_outputs(path, outputs, sizes_only=not verify)
    if problems and not verify:
        return {"manifest": str(manifest), "agrees": f"no: {'; '.join(problems[:3])}"}
    if problems:
        raise IntegrityError(
            f"{manifest.name} is not of these files: {'; '.join(problems[:3])}",
            hint="a run that replaced them was cut off: any further run into this directory finishes it; "
            "or they were changed since",
        )
    return {"manifest": str(manifest), "agrees": "hashes" if verify else "sizes"}
