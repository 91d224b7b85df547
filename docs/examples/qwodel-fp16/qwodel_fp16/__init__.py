"""A qwodel backend that casts a checkpoint's matrices to float16, file by file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from qwodel.backends.base import BackendOptions, BaseQuantizer, FormatSpec, Job
from qwodel.exceptions import ConversionError, IntegrityError
from qwodel.source import ModelSource, inspect_source


class FP16Options(BackendOptions):
    """Options of this backend; those every backend takes are inherited."""

    keep_vectors: bool = Field(True, description="Leave one-dimensional tensors as they are.")


class FP16Quantizer(BaseQuantizer[FP16Options]):
    """torch: cast and save."""

    name: ClassVar[str] = "fp16"
    extra: ClassVar[str] = "fp16"
    accepts: ClassVar[frozenset[str]] = frozenset({"huggingface"})
    packages: ClassVar[tuple[str, ...]] = ("torch", "safetensors")
    options_type = FP16Options

    @classmethod
    def formats(cls) -> Mapping[str, FormatSpec]:
        spec = FormatSpec("float16", "Every matrix as float16.", bits=16.0, read_by="transformers, vLLM")
        return {spec.name: spec}

    def output_name(self, source: ModelSource, spec: FormatSpec, options: FP16Options) -> str:
        return f"{source.name}-{spec.name}"

    def run(self, job: Job[FP16Options]) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        target, source = job.output.path, job.source
        target.mkdir()
        job.progress.stage("quantize", "casting")
        for number, file in enumerate(source.weight_files):
            job.progress.update(number, len(source.weight_files), file.name)
            if file.suffix != ".safetensors":
                raise ConversionError(
                    f"{file.name} is no safetensors file", hint="save the model as safetensors"
                )
            tensors = load_file(file)
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and (tensor.dim() > 1 or not job.options.keep_vectors):
                    tensors[name] = tensor.to(torch.float16)
            save_file(tensors, target / file.name, metadata={"format": "pt"})
        for side in source.path.iterdir():  # config, tokenizer, licence, shard index
            if side.is_file() and side not in source.weight_files:
                shutil.copy2(side, target / side.name)
        self._verify(job)

    def _verify(self, job: Job[FP16Options]) -> None:
        """Read back what was written, as its reader will."""
        job.progress.stage("verify", "reading the files back")
        written = inspect_source(job.output.path)
        if {n: t.shape for n, t in written.tensors.items()} != {
            n: t.shape for n, t in job.source.tensors.items()
        }:
            raise IntegrityError("names or shapes differ from the source's")
        job.report["dtypes"] = dict(written.dtypes)
