"""The plan of a conversion: every tensor's decision and place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwodel.checkpoint.families.model_family import ModelFamily
from qwodel.checkpoint.files.output_tensor import OutputTensor
from qwodel.checkpoint.files.writer import FilePlan
from qwodel.checkpoint.layouts.layout import Layout
from qwodel.checkpoint.plan.recipe import Recipe
from qwodel.checkpoint.source.checkpoint import Checkpoint
from qwodel.checkpoint.tensors import Action, TensorPlan
from qwodel.display import shown

__all__ = ["Plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole conversion, ready to be carried out or printed.

    Attributes:
        checkpoint: the source.
        tensors: one entry a weight, in the source's order, dropped ones included.
        files: the safetensors files to write.
        documents: other files to write, by name.
        side_files: files to copy, by their path relative to the source directory.
        constants: tensors that belong to no weight.
        family: what the model was recognised as.
        warnings: what the user should know, in sentences.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    layout: Layout
    tensors: tuple[TensorPlan, ...]
    files: tuple[FilePlan, ...]
    documents: Mapping[str, bytes]
    side_files: Mapping[str, Path]
    constants: tuple[OutputTensor, ...]
    family: ModelFamily
    warnings: tuple[str, ...]

    @property
    def source(self) -> Path:
        """The source's file or directory."""
        return self.checkpoint.path

    @property
    def dropped(self) -> Mapping[str, str]:
        """Stored tensors that are no weights, and why they are left behind."""
        return self.checkpoint.sources.dropped

    @property
    def weight_bytes(self) -> int:
        """Exact size of the safetensors files."""
        return sum(file.size for file in self.files)

    @property
    def output_bytes(self) -> int:
        """Exact size of everything written."""
        side = sum(path.stat().st_size for path in self.side_files.values())
        return self.weight_bytes + sum(len(text) for text in self.documents.values()) + side

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The source's files that hold weights."""
        return self.checkpoint.headers.files

    @property
    def source_bytes(self) -> int:
        """Bytes of the source tensors that will be read."""
        places = self.checkpoint.headers.places()
        return sum(places[part][1].nbytes for each in self.tensors for part in each.source.stored)

    def counts(self) -> dict[str, int]:
        """Return how many tensors become what."""
        return dict(Counter(each.becomes for each in self.tensors))

    def rows(self) -> Iterator[tuple[str, str, str, str, int, str]]:
        """Yield (name, source dtype, shape, becomes, output bytes, reason) of every tensor."""
        for each in self.tensors:
            shape = "×".join(str(n) for n in each.source.shape) or "scalar"
            kind = each.source.encoding or each.source.dtype
            yield each.name, kind, shape, each.becomes, each.output_bytes, each.reason
        for name, reason in self.dropped.items():
            yield name, "", "", str(Action.DROP), 0, reason

    def table(self) -> str:
        """Return the plan as text: a line a tensor, then the totals."""
        lines = [("tensor", "source", "shape", "becomes", "bytes", "reason")]
        lines += [
            (shown(name), shown(kind), shape, to, f"{size:,}", shown(why))
            for name, kind, shape, to, size, why in self.rows()
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        text = [
            "  ".join([*(cell.ljust(n) for cell, n in zip(line, widths, strict=False)), line[5]])
            for line in lines
        ]
        counts = ", ".join(f"{count} {what}" for what, count in self.counts().items())
        return "\n".join(
            [
                *text,
                f"model family: {self.family}",
                f"tensors: {counts}",
                f"output: {self.output_bytes:,} bytes in {len(self.files)} weight file(s), {self.layout.name} layout",
                *(f"warning: {shown(warning)}" for warning in self.warnings),
            ]
        )

    def paths(self, destination: Path) -> dict[str, Path]:
        """Return file name in the plan → path: ``destination`` itself for a one-file layout."""
        if self.layout.single_file:
            return {self.files[0].name: destination}
        return {file.name: destination / file.name for file in self.files}
