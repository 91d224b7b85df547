"""``qwodel inspect``: what a model is, from its headers alone."""

from __future__ import annotations

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
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar="HF_TOKEN", show_envvar=False, help="Hugging Face token [env: HF_TOKEN]."),
    ] = None,
    json_: JsonFlag = False,
) -> None:
    """Show architecture, parameters, dtypes and size; reads headers only, downloads no weights."""
    from qwodel.cli.report import human_bytes, print_json, print_table, say
    from qwodel.hub import HubModel, looks_like_hub_id
    from qwodel.source import inspect_source
    from qwodel.untrusted import checked_path, kind_of

    if looks_like_hub_id(model) and kind_of(checked_path(model)) is None:
        facts: dict[str, Any] = HubModel(model, revision, token).describe()
        listed: list[dict[str, Any]] = facts.pop("tensor_list")
    else:
        source = inspect_source(model)
        facts = source.describe()
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
