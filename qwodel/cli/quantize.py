"""``qwodel quantize``: one model, one format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qwodel.cli.arguments import Backend, FormatOption, OptionPairs, parse_options

__all__ = ["quantize"]


def quantize(
    model: Annotated[str, typer.Argument(help="A model directory, a model file, or a hub id (owner/name).")],
    backend: Backend,
    format: FormatOption,  # noqa: A002 - the option's name
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where the result goes.")] = Path(
        "quantized_models"
    ),
    option: OptionPairs = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes that share a calibration, one a GPU (awq).")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar="HF_TOKEN", show_envvar=False, help="Hugging Face token [env: HF_TOKEN]."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the facts about the result as JSON.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress; print only the result's path.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what happens; tracebacks for errors.")
    ] = False,
) -> None:
    """Quantize MODEL and print where the result is.

    Nothing is published until it has been read back and compared with its source;
    whatever fails or is interrupted leaves nothing behind.

    \b
    Examples:
      qwodel quantize ./SmolLM2-135M-Instruct -b gguf -f Q4_K_M -o out
      qwodel quantize HuggingFaceTB/SmolLM2-135M-Instruct -b gguf -f Q8_0
      qwodel quantize ./model -b gguf -f IQ2_M -O calibration_dataset=text.txt
    """
    import logging

    from qwodel.cli.report import print_json, print_path, progress_display
    from qwodel.process import log_to_terminal
    from qwodel.quantizer import Quantizer

    log_to_terminal(logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING)
    if not verbose:  # its warnings repeat what our error will say
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    options = parse_options(option or [])
    for name, value in {
        "revision": revision,
        "token": token,
        "overwrite": overwrite or None,
        "nproc": nproc,
    }.items():
        if value is not None:
            options[name] = value
    with progress_display(quiet=quiet) as callback:
        quantizer = Quantizer(backend, model, output_dir, callback, **options)
        path = quantizer.quantize(format)
    info = quantizer.get_model_info()
    if json_:
        print_json(info)
    elif quiet:
        print_path(path)
    else:
        _summary(info)


def _summary(info: dict[str, Any]) -> None:
    from qwodel.cli.report import human_bytes, say

    bits = f", {info['bits_per_weight']:.2f} bits a weight" if "bits_per_weight" in info else ""
    say(f"{info['quantized_model']}  ({human_bytes(info['file_size'])}{bits}, {info['seconds']:.1f} s)")
    quality = [value for value in info.get("sqnr_db", {}).values() if value is not None]
    if quality:
        worst = min((value, name) for name, value in info["sqnr_db"].items() if value is not None)
        say(f"  decoded and compared: {len(quality)} tensors, worst {worst[0]:.1f} dB ({worst[1]})")
    fallbacks = info.get("fallbacks") or []
    if fallbacks:
        kinds = sorted({f"{item['asked']} → {item['got']}" for item in fallbacks})
        say(f"  {len(fallbacks)} tensors could not take the asked type: {', '.join(kinds)}")
    say(f"  manifest: {info['manifest']}")
