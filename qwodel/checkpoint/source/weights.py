"""Reading any checkpoint this package understands as plain weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from qwodel.checkpoint.source.checkpoint import Checkpoint
from qwodel.untrusted import checked_path

__all__ = ["read_weights"]


def read_weights(path: Path | str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and numbers of every weight, one in memory at a time.

    Quantized weights are decoded: scaled FP8 and INT8, ConvRot and QuIP's rotated codes, MXFP4, NVFP4.

    Args:
        path: a ``.safetensors`` file or a directory of shards.

    Raises:
        ValidationError: the path is no checkpoint, or is quantized in a way not understood.
        IntegrityError: a file is damaged.
    """
    checkpoint = Checkpoint.alone(checked_path(path))
    with checkpoint.open() as reader:
        for source in checkpoint.sources.tensors:
            if source.shape and source.decoder is not None:
                yield source.name, source.row_decoder.rows(reader, 0, source.shape[0])
            else:
                yield source.name, reader.get_tensor(source.stored[0])
