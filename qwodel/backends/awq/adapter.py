"""The AWQ backend: Hugging Face directory in, compressed-tensors directory out."""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qwodel.backends.awq.loading import check_architecture
from qwodel.backends.awq.options import AWQOptions
from qwodel.backends.base import BaseQuantizer, FormatSpec, Job
from qwodel.calibration import describe_dataset
from qwodel.calibration.options import renamed
from qwodel.exceptions import (
    CalibrationError,
    ConfigurationError,
    IntegrityError,
    ResourceError,
    ValidationError,
)
from qwodel.hardware import CalibrationSizes, Fitted, available_memory, list_gpus, with_backoff
from qwodel.model_config import context_length, read_config, text_config
from qwodel.output import require_space
from qwodel.side_files import copy_side_files, side_files
from qwodel.source import ModelSource

if TYPE_CHECKING:
    from qwodel.backends.awq.compress import Outcome

__all__ = ["AWQQuantizer"]

_FORMATS = {
    "int4": FormatSpec(
        "int4",
        "4-bit weight quantization (W4A16). Best for GPU inference.",
        4.25,
        "vLLM, transformers",
        aliases=("W4A16", "W4A16_ASYM", "awq"),
    )
}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_DTYPE_BYTES = {"F64": 8, "F32": 4}


class AWQQuantizer(BaseQuantizer[AWQOptions]):
    """llm-compressor: activation-aware weight quantization to four bits."""

    name: ClassVar[str] = "awq"
    extra: ClassVar[str] = "awq"
    accepts: ClassVar[frozenset[str]] = frozenset({"huggingface"})
    packages: ClassVar[tuple[str, ...]] = (
        "llmcompressor",
        "compressed-tensors",
        "transformers",
        "torch",
        "numpy",
    )
    stages: ClassVar[Mapping[str, float]] = {"resolve": 1, "calibrate": 90, "verify": 8, "publish": 1}
    options_type = AWQOptions

    @classmethod
    def formats(cls) -> Mapping[str, FormatSpec]:
        """Weight-only formats of compressed-tensors, by name."""
        return _FORMATS

    @classmethod
    def parse_options(cls, given: Mapping[str, Any], base: AWQOptions | None = None) -> AWQOptions:
        """Validate options, the calibration options' other spellings among them."""
        return super().parse_options(renamed(given), base)

    def output_name(self, source: ModelSource, spec: FormatSpec, options: AWQOptions) -> str:
        """``<model>-AWQ-<format>``, a directory."""
        return f"{source.name}-AWQ-{spec.name}"

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse a model that generates no text or is quantized already, with ValidationError."""
        check_architecture(config)

    def check(self, source: ModelSource, spec: FormatSpec, options: AWQOptions) -> None:
        """Refuse what cannot end well before anything is loaded.

        Raises:
            ValidationError: a file, or an architecture AWQ does not take.
            CalibrationError: text has to be tokenized, and there is no tokenizer.
            ConfigurationError: more processes than GPUs or samples.
        """
        if source.path.is_file() or not source.config:
            raise ValidationError(
                f"{source.given} has no config.json", hint="give the directory that save_pretrained wrote"
            )
        check_architecture(source.config)
        if not _is_token_lists(options) and not any((source.path / name).is_file() for name in _TOKENIZERS):
            raise CalibrationError(
                f"{source.path} has no tokenizer, and calibration text must be tokenized",
                hint="copy tokenizer.json (or tokenizer.model) and tokenizer_config.json from the model's "
                "repository, or calibrate on lists of token ids",
            )
        gpus = list_gpus()
        if options.nproc > 1 and gpus and options.nproc > len(gpus):
            raise ConfigurationError(
                f"nproc is {options.nproc}, and there are {len(gpus)} GPUs", hint="take one process a GPU"
            )
        if options.num_samples is not None and options.nproc > options.num_samples:
            raise ConfigurationError(
                f"{options.nproc} processes cannot share {options.num_samples} samples", hint="take fewer"
            )
        needed, free = _model_bytes(source) * options.nproc, available_memory()
        if needed > free:
            raise ResourceError(
                f"loading {source.name} takes {needed / 1e9:.1f} GB of main memory, and {free / 1e9:.1f} GB is free",
                hint="free some memory, take fewer processes (nproc), or use a larger machine",
            )

    def run(self, job: Job[AWQOptions]) -> None:
        """Search scales in child processes, with smaller sizes where memory runs out; save; read back."""
        from qwodel.backends.awq.sizes import starting_sizes

        require_space(job.output.final.parent, job.source.weight_bytes, f"making {job.output.final.name}")
        if not list_gpus():
            self.log.warning("no GPU is here: the search for scales runs on the CPU and takes long")
        start = starting_sizes(job.source, job.options)
        attempt = functools.partial(self._attempt, job)
        fitted = with_backoff(attempt, start.sizes, estimate=start.estimate, free=start.free)
        self._verify(job, fitted, start.headroom)

    def _attempt(self, job: Job[AWQOptions], sizes: CalibrationSizes) -> Outcome:
        """Calibrate with these sizes, from weights as the source has them."""
        from qwodel.backends.awq.compress import Compression
        from qwodel.backends.awq.launch import run_compression

        if job.output.path.exists():
            shutil.rmtree(job.output.path)
        job.progress.stage("calibrate", f"reading {describe_dataset(job.options.calibration_dataset)}")
        work = Compression(
            model=job.source.path.resolve(),
            architecture=check_architecture(job.source.config),
            tokens=_write_tokens(job, sizes),
            target=job.output.path,
            batch_size=sizes.batch_size,
            options=job.options,
        )
        return run_compression(work, job.progress.update, job.output.scratch)

    def _verify(self, job: Job[AWQOptions], fitted: Fitted[Outcome], headroom: int) -> None:
        import numpy as np

        from qwodel.backends.awq.compress import PROBE_TOKENS
        from qwodel.backends.awq.verify import account, check_fused_layers, check_logits, tensor_entries

        outcome, options, folder = fitted.value, job.options, job.output.path
        job.progress.stage("verify", "reading the directory back")
        copy_side_files(side_files(job.source.path), folder)
        job.output.written()
        fused = check_fused_layers(folder, outcome.quantized)
        fates = account(job.source, folder)
        _check_ties(job.source, folder)
        if fates.dropped:
            self.log.warning(
                "%d source tensors are not in the result: %s …", len(fates.dropped), fates.dropped[0]
            )
        job.progress.update(1, 3, "loading it with transformers")
        tokens_file = job.output.scratch / "tokens.npy"
        tokens = np.load(tokens_file)
        logits = check_logits(
            folder, check_architecture(job.source.config), tokens[:1, :PROBE_TOKENS],
            outcome.probe_logits, _main_dtype(job.source),
        )  # fmt: skip
        stored = tensor_entries(folder)
        packed = sum(
            entry.nbytes for name, entry in stored.items()
            if any(name.startswith(f"{layer}.weight_") for layer in _packed_layers(stored))
        )  # fmt: skip
        weights = sum(job.source.tensors[name].numel for name in fates.quantized)
        job.report |= {
            "bits_per_weight": round(
                sum(e.nbytes for e in stored.values()) * 8 / max(job.source.parameters, 1), 3
            ),
            "quantized_bits_per_weight": round(packed * 8 / max(weights, 1), 3),
            "group_size": outcome.group_size,
            "symmetric": outcome.symmetric,
            "layers": fused.layers,
            "fused_groups": fused.groups,
            "untouched": outcome.untouched,
            "expert_tokens": {
                name: count for name, count in outcome.tokens_seen.items() if ".experts." in name
            },
            "tensors": fates.counts(),
            "dropped": fates.dropped,
            "logits": asdict(logits),
            "calibration": {
                "dataset": describe_dataset(options.calibration_dataset),
                "split": options.calibration_split,
                "batch_size": fitted.sizes.batch_size,
                "seq_length": int(tokens.shape[1]),
                "num_samples": int(tokens.shape[0]),
                "sha256": hashlib.sha256(tokens_file.read_bytes()).hexdigest(),
                "headroom_bytes": headroom,
                "backoff": [step.as_dict() for step in fitted.steps],
            },
        }


def _packed_layers(stored: Iterable[str]) -> set[str]:
    return {name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")}


def _write_tokens(job: Job[AWQOptions], sizes: CalibrationSizes) -> Path:
    import numpy as np

    from qwodel.calibration import load_tokens
    from qwodel.modeling.calibration_batches import load_tokenizer

    options = job.options
    tokens = load_tokens(
        options.calibration_dataset,
        None if _is_token_lists(options) else load_tokenizer(job.source.path),
        num_samples=sizes.num_samples,
        seq_length=sizes.seq_length,
        seed=options.seed,
        split=options.calibration_split,
        token=options.token,
        column=options.text_column,
        context_length=context_length(job.source.config),
    )
    largest = _vocabulary(job.source)
    if largest and int(tokens.max()) >= largest:
        raise CalibrationError(
            f"the calibration set holds token {int(tokens.max())}, and the model knows {largest}",
            hint="tokenize it with this model's own tokenizer",
        )
    path = job.output.scratch / "tokens.npy"
    np.save(path, tokens)
    return path


def _is_token_lists(options: AWQOptions) -> bool:
    dataset = options.calibration_dataset
    return isinstance(dataset, list) and not any(
        isinstance(item, str | Mapping) or _is_chat(item) for item in dataset
    )


def _is_chat(item: Any) -> bool:
    return isinstance(item, list | tuple) and bool(item) and isinstance(item[0], Mapping)


def _vocabulary(source: ModelSource) -> int:
    return int(text_config(source.config).get("vocab_size") or 0)


def _main_dtype(source: ModelSource) -> str:
    return max(source.dtypes, key=lambda name: source.dtypes[name], default="BF16")


def _model_bytes(source: ModelSource) -> int:
    return sum(count * _DTYPE_BYTES.get(dtype, 2) for dtype, count in source.dtypes.items())


def _check_ties(source: ModelSource, folder: Path) -> None:
    """Refuse a result whose embeddings are tied where the source's were not, or the other way round."""

    def tied(config: Mapping[str, Any]) -> Any:
        return text_config(config).get("tie_word_embeddings")

    written = read_config(folder)
    if tied(source.config) is not None and tied(written) != tied(source.config):
        raise IntegrityError(
            f"tie_word_embeddings was {tied(source.config)} and is {tied(written)} in the result"
        )
