"""SmoothQuant: W8A8 models that compute the same function, and run in INT8.

Xiao et al., https://arxiv.org/abs/2211.10438.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwodel.smoothquant.calibration import (
        compute_activation_scales,
        load_activation_scales,
        save_activation_scales,
    )
    from qwodel.smoothquant.evaluate import evaluate_ppl
    from qwodel.smoothquant.fake_quant import (
        fake_quantize_activation_per_channel_asymmetric,
        fake_quantize_activation_per_channel_symmetric,
        fake_quantize_activation_per_tensor_asymmetric,
        fake_quantize_activation_per_tensor_symmetric,
        fake_quantize_activation_per_token_asymmetric,
        fake_quantize_activation_per_token_symmetric,
        fake_quantize_weight_per_channel_asymmetric,
        fake_quantize_weight_per_channel_symmetric,
        fake_quantize_weight_per_tensor_asymmetric,
        fake_quantize_weight_per_tensor_symmetric,
    )
    from qwodel.smoothquant.int8_model import Int8ForCausalLM
    from qwodel.smoothquant.observe import ActivationStatistics, observe_activations
    from qwodel.smoothquant.opt import Int8OPTForCausalLM
    from qwodel.smoothquant.scheme import Scheme
    from qwodel.smoothquant.simulate import fake_quantized
    from qwodel.smoothquant.smooth import Smoothed, smooth_lm, smooth_model

__all__ = [
    "ActivationStatistics",
    "Int8ForCausalLM",
    "Int8OPTForCausalLM",
    "Scheme",
    "Smoothed",
    "compute_activation_scales",
    "evaluate_ppl",
    "fake_quantize_activation_per_channel_asymmetric",
    "fake_quantize_activation_per_channel_symmetric",
    "fake_quantize_activation_per_tensor_asymmetric",
    "fake_quantize_activation_per_tensor_symmetric",
    "fake_quantize_activation_per_token_asymmetric",
    "fake_quantize_activation_per_token_symmetric",
    "fake_quantize_weight_per_channel_asymmetric",
    "fake_quantize_weight_per_channel_symmetric",
    "fake_quantize_weight_per_tensor_asymmetric",
    "fake_quantize_weight_per_tensor_symmetric",
    "fake_quantized",
    "load_activation_scales",
    "observe_activations",
    "save_activation_scales",
    "smooth_lm",
    "smooth_model",
]

_HOME = {
    **dict.fromkeys(
        ("compute_activation_scales", "load_activation_scales", "save_activation_scales"), "calibration"
    ),
    **dict.fromkeys((name for name in __all__ if name.startswith("fake_quantize_")), "fake_quant"),
    **dict.fromkeys(("ActivationStatistics", "observe_activations"), "observe"),
    **dict.fromkeys(("Smoothed", "smooth_lm", "smooth_model"), "smooth"),
    "Int8ForCausalLM": "int8_model",
    "Int8OPTForCausalLM": "opt",
    "Scheme": "scheme",
    "evaluate_ppl": "evaluate",
    "fake_quantized": "simulate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qwodel.smoothquant' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"qwodel.smoothquant.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
