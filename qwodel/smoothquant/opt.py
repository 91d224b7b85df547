"""OPT in INT8."""

from __future__ import annotations

from typing import ClassVar

from qwodel.smoothquant.int8_model import Int8ForCausalLM

__all__ = ["Int8OPTForCausalLM"]


class Int8OPTForCausalLM(Int8ForCausalLM):
    """:class:`~qwodel.smoothquant.int8_model.Int8ForCausalLM` for OPT models only.

    Directories in the custom layout of torch-int, without ``quantization_config``, are refused.
    """

    model_types: ClassVar[tuple[str, ...] | None] = ("opt",)
