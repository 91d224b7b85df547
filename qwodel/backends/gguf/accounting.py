"""Which source tensors a converted GGUF holds, so that nothing is dropped in silence."""

from __future__ import annotations

import re

from qwodel.gguf_header import GGUFHeader
from qwodel.source import ModelSource

__all__ = ["dropped_tensors"]

_CONSTANTS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
"""Tensors the converter computes from the configuration."""


def dropped_tensors(source: ModelSource, header: GGUFHeader) -> list[str]:
    """Return the source tensors that have no place in ``header``, sorted.

    Where the element counts agree nothing can be missing. Otherwise names are
    matched through the ``gguf`` package's map; a tensor that the converter renames
    in code of its own may then be listed though it is there.
    """
    held = sum(tensor.numel for name, tensor in header.tensors.items() if name not in _CONSTANTS)
    tied = {
        name
        for name in source.tensors
        if name.endswith("lm_head.weight")
        and source.tied_embeddings
        and "output.weight" not in header.tensors
    }
    expected = source.parameters - sum(source.tensors[name].numel for name in tied)
    if held == expected:
        return []
    return sorted(name for name in source.tensors.keys() - tied if not _placed(name, header))


def _placed(name: str, header: GGUFHeader) -> bool:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(
        (arch for arch, text in MODEL_ARCH_NAMES.items() if text == header.architecture), None
    )
    blocks = header.metadata.get(f"{header.architecture}.block_count")
    if architecture is None or not isinstance(blocks, int):
        return True
    # Experts are stacked: model.layers.0.mlp.experts.7.up_proj → …experts.up_proj
    stacked = re.sub(r"\.experts\.\d+\.", ".experts.", name)
    mapped = get_tensor_name_map(architecture, blocks).get_name(stacked, try_suffixes=(".weight", ".bias"))
    return mapped in header.tensors
