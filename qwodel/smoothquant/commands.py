"""The command-line tools: activation scales, export to INT8, perplexity.

Each is a console script, a module (``python -m``) and a verb of ``qwodel``. Nothing heavy is imported
before a tool runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qwodel.display import shown
from qwodel.exceptions import ConfigurationError
from qwodel.process import main_of
from qwodel.untrusted import checked_path, kind_of

__all__ = ["TOOLS", "application", "export_int8_model", "generate_act_scales", "ppl_eval"]

_DATASET = "Calibration text: a .txt, .json, .jsonl or .parquet file, a folder, or a hub dataset (repo or repo:subset)."


def generate_act_scales(
    model_name: Annotated[str, typer.Option("--model-name", help="Hugging Face model ID or local path.")],
    output_path: Annotated[
        Path, typer.Option("--output-path", help="Where to save scales: a .pt or a .safetensors file.")
    ],
    num_samples: Annotated[
        int, typer.Option("--num-samples", min=1, help="Number of calibration samples.")
    ] = 512,
    seq_len: Annotated[int, typer.Option("--seq-len", min=1, help="Tokens a sample is cut to.")] = 512,
    dataset_path: Annotated[
        str | None, typer.Option("--dataset-path", help=f"{_DATASET} WikiText-2 from the hub if not given.")
    ] = None,
    per_gpu_batch_size: Annotated[
        int, typer.Option("--per-gpu-batch-size", min=1, help="Samples run together.")
    ] = 8,
) -> None:
    """Generate activation channel scales for a model."""
    from qwodel.calibration import DEFAULT_DATASET, load_texts
    from qwodel.smoothquant.calibration import compute_activation_scales, save_activation_scales

    _check_suffix(output_path)
    model, tokenizer = _open(model_name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Documents are taken in turn, as the published tool takes its lines.
    texts = (text for text in load_texts(dataset_path or DEFAULT_DATASET) if text.strip())
    scales = compute_activation_scales(
        model, _grouped(texts, per_gpu_batch_size), num_samples, tokenizer=tokenizer, seq_len=seq_len
    )
    path = save_activation_scales(scales, output_path)
    typer.echo(shown(f"{path}  ({len(scales)} layers)"))


def export_int8_model(
    model_path: Annotated[
        str, typer.Option("--model_path", help="Original model (Hugging Face ID or path).")
    ],
    output_path: Annotated[Path, typer.Option("--output_path", help="Output directory for quantized model.")],
    act_scales_path: Annotated[
        Path, typer.Option("--act_scales_path", help="Path to activation scales file.")
    ],
    alpha: Annotated[float, typer.Option("--alpha", help="Smoothing factor.")] = 0.5,
) -> None:
    """Export a model quantized with SmoothQuant: INT8 weights, activations rounded token by token.

    The directory is in the compressed-tensors format (int-quantized); transformers, vLLM and
    Int8ForCausalLM load it.
    """
    from qwodel.hashes import SourceFiles
    from qwodel.output import StagedOutput
    from qwodel.progress import Progress
    from qwodel.report import envelope, source_facts
    from qwodel.side_files import files_beside
    from qwodel.smoothquant.export import export_w8a8, report_of
    from qwodel.smoothquant.export_options import ExportOptions
    from qwodel.smoothquant.int8_model import local_folder
    from qwodel.source import inspect_source

    source = local_folder(model_path)
    model = inspect_source(source)
    options = ExportOptions(alpha=alpha, rotations="none", act_scales=act_scales_path)
    with StagedOutput(output_path) as output, SourceFiles(model.weight_files, files_beside(source)) as files:
        exported = export_w8a8(model, output.path, output.scratch, options, Progress(None))
        output.publish(
            envelope(
                backend="smoothquant",
                format="w8a8_dynamic",
                source=source_facts(source, files.settled()),
                recipe={"act_scales": act_scales_path, "alpha": alpha},
                packages=("torch", "transformers", "safetensors"),
                report=report_of(exported),
            )
        )
    errors = ", ".join(f"{name} {value:.2g}" for name, value in exported.logits.items())
    typer.echo(
        shown(f"{output_path}  ({len(exported.done.quality)} layers; relative errors of logits: {errors})")
    )


def ppl_eval(
    model_path: Annotated[str, typer.Option("--model_path", help="Model to evaluate.")],
    act_scales_path: Annotated[
        Path | None, typer.Option("--act_scales_path", help="Path to activation scales.")
    ] = None,
    smooth: Annotated[bool, typer.Option("--smooth", help="Apply smoothing.")] = False,
    alpha: Annotated[float, typer.Option("--alpha", help="Smoothing factor.")] = 0.5,
    quantize: Annotated[bool, typer.Option("--quantize", help="Apply fake quantization.")] = False,
    dataset_name: Annotated[
        str, typer.Option("--dataset_name", help="Dataset for evaluation: a name, a hub id or a text file.")
    ] = "wikitext",
    dataset_config: Annotated[
        str | None, typer.Option("--dataset_config", help="Dataset configuration, such as wikitext-2.")
    ] = None,
    n_samples: Annotated[
        int | None,
        typer.Option("--n_samples", min=1, help="Windows of 2048 tokens at most; all if not given."),
    ] = None,
) -> None:
    """Evaluate perplexity of quantized models."""
    from qwodel.smoothquant.calibration import load_activation_scales
    from qwodel.smoothquant.evaluate import evaluate_ppl

    if smooth and act_scales_path is None:
        raise ConfigurationError(
            "--smooth needs --act_scales_path", hint="make the file with generate_act_scales"
        )
    scales = load_activation_scales(act_scales_path) if act_scales_path else None
    model, tokenizer = _open(model_path)
    result = evaluate_ppl(
        model,
        _dataset(dataset_name, dataset_config),
        scales,
        alpha,
        smooth,
        quantize,
        tokenizer=tokenizer,
        num_samples=n_samples,
    )
    typer.echo(f"Perplexity: {result:.4f}")


TOOLS: Mapping[str, Callable[..., None]] = {
    "generate-act-scales": generate_act_scales,
    "export-int8-model": export_int8_model,
    "ppl-eval": ppl_eval,
}
"""The tools by the names of their verbs."""


def application(name: str) -> typer.Typer:
    """A tool as an application of its own."""
    made = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    made.command(context_settings={"help_option_names": ["-h", "--help"]})(TOOLS[name])
    return made


def generate_act_scales_main() -> None:
    """The console script ``generate_act_scales``."""
    main_of(application("generate-act-scales"))


def export_int8_model_main() -> None:
    """The console script ``export_int8_model``."""
    main_of(application("export-int8-model"))


def ppl_eval_main() -> None:
    """The console script ``ppl_eval``."""
    main_of(application("ppl-eval"))


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".pt", ".safetensors"):
        raise ConfigurationError(f"{path} ends neither in .pt nor in .safetensors")


def _dataset(name: str, config: str | None) -> str:
    if config is None or kind_of(checked_path(name)) is not None:
        return name
    return config if config.casefold() in ("wikitext-2", "wikitext-103") else f"{name}:{config}"


def _open(name: str) -> tuple[Any, Any]:
    """A model in its own dtype, on the GPU where there is one, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qwodel.smoothquant.int8_model import local_folder

    folder = local_folder(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _grouped(texts: Any, size: int) -> Any:
    from itertools import islice

    pending = iter(texts)
    return iter(lambda: list(islice(pending, size)), [])
