"""``qwodel calibrate``: what a model's layers see, kept for later runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["calibrate"]


def calibrate(
    model: Annotated[Path, typer.Argument(help="A model directory that transformers can run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The statistics file to write.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="Text: a .txt, .json, .jsonl or .parquet file, a folder, or a hub dataset (repo or repo:subset).",
        ),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="Sequences; unset: two tokens an input channel, at least 16384.")
    ] = None,
    seq_length: Annotated[int, typer.Option(min=1, help="Tokens a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences run together.")] = 4,
    split: Annotated[str, typer.Option(help="Split of a hub dataset.")] = "train",
    column: Annotated[str | None, typer.Option(help="Text column; found by its name if unset.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of sequences.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "cpu",
    maxima_only: Annotated[
        bool,
        typer.Option("--maxima-only", help="No Gram matrices: a small file, for activation scales only."),
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(envvar="HF_TOKEN", show_envvar=False, help="Hugging Face token [env: HF_TOKEN]."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Run MODEL on text, block by block, and keep what each linear layer reads.

    The file serves any number of later runs: -O calibration_data_path=FILE of the fp8 and int8
    backends, and convert_to_int8. Memory holds one block of the model.

    \b
    Examples:
      qwodel calibrate ./SmolLM2-135M-Instruct --data text.txt -o stats.safetensors
      qwodel quantize ./SmolLM2-135M-Instruct -b int8 -f int8_row -O calibration_data_path=stats.safetensors
    """
    from qwodel.calibration import DEFAULT_DATASET
    from qwodel.cli.report import human_bytes, print_path, progress_display, say
    from qwodel.exceptions import DependencyError
    from qwodel.extras import install_hint

    try:
        from qwodel.devices import resolve_device
        from qwodel.modeling.calibrated import collect_from_checkpoint
        from qwodel.modeling.calibration_batches import CalibrationOptions
    except ImportError as error:
        raise DependencyError(f"calibrate needs {error.name}", hint=install_hint("calibrate")) from error
    given: dict[str, Any] = {"split": split, "column": column, "token": token, "seed": seed}
    options = CalibrationOptions(
        data or DEFAULT_DATASET,
        num_samples,
        seq_length,
        batch_size,
        device=str(resolve_device(device)),
        **given,
    )
    with progress_display(quiet=quiet) as callback:
        path = collect_from_checkpoint(
            model, output, options, gram=not maxima_only, progress_callback=callback, overwrite=overwrite
        )
    if quiet:
        print_path(path)
    else:
        say(f"{path}  ({human_bytes(path.stat().st_size)})")
