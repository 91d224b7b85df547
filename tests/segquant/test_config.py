"""Settings: by name pattern, first match; every key works or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from qwodel.exceptions import ConfigurationError
from qwodel.segquant import Calibrate, DType, Optimum, SegPattern, default_quantize_config
from qwodel.segquant.config import Configuration
from qwodel.segquant.settings import AlphaSearch


def test_the_default_is_that_of_the_documentation() -> None:
    settings = Configuration().of("any.layer")
    assert settings.enable
    assert settings.seglinear
    assert not settings.real_quant
    assert settings.opt.type is Optimum.SMOOTH
    assert settings.opt.alphas() == [0.5]
    assert settings.calib.type is Calibrate.AMAX
    assert settings.input_quant.type is DType.INT8
    assert settings.input_quant.axis is None
    assert settings.weight_quant.type is DType.INT8
    assert list(settings.search_patterns) == SegPattern.all()
    assert Configuration(default_quantize_config).default == settings


def test_the_first_pattern_that_fits_wins_and_inherits_from_default() -> None:
    config = Configuration(
        {
            "blocks.0.*": {"weight_quant": {"type": DType.INT4}},
            "*.q": {"enable": False},
            "default": {"weight_quant": {"type": "int8", "axis": 1}, "opt": {"type": "svd", "low_rank": 4}},
            "*.o": {"opt": {"type": Optimum.DEFAULT}},
        }
    )
    assert config.of("blocks.0.q").enable
    assert config.of("blocks.0.q").weight_quant.type is DType.INT4
    assert config.of("blocks.0.q").weight_quant.axis == 1
    assert not config.of("blocks.1.q").enable
    assert config.of("blocks.1.k").opt.low_rank == 4
    assert config.of("blocks.1.o").opt.type is Optimum.DEFAULT


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({}, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        ({"min": 0.0, "max": 1.0, "step": 0.5}, [0, 0.5, 1]),
        ({"min": 0.1, "max": 0.5, "step": 0.3}, [0.1, 0.4, 0.5]),
        ({"min": 0.3, "max": 0.3}, [0.3]),
    ],
)
def test_a_search_includes_its_end_point(given: dict[str, Any], values: list[float]) -> None:
    assert AlphaSearch(**given).values() == pytest.approx(values)


GPTQ_KEYS = ("blocksize", "percdamp", "groupsize", "actorder", "static_groups", "cpu_storage")


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"enabled": True}, "there is no setting 'default.enabled'", "did you mean 'enable'"),
        ({"opt": {"alhpa": 1}}, "there is no setting 'default.opt.alhpa'", "did you mean 'alpha'"),
        ({"input_quant": {"dummy": True}}, "'default.input_quant.dummy'", "FP16 or BF16"),
        ({"weight_quant": {"dual_scale": True}}, "'default.weight_quant.dual_scale'", "keys: type"),
        ({"opt": {"type": "smoth"}}, "'default.opt.type'", "default, smooth, svd"),
        ({"input_quant": {"type": "int3"}}, "'default.input_quant.type'", "int4, int6"),
        ({"opt": {"alpha": 1.5}}, "'default.opt.alpha'", None),
        ({"opt": {"search_alpha_config": {"min": 0.8, "max": 0.2}}}, "min is 0.8, greater than max", None),
        ({"opt": {"search_alpha_config": {"step": 0}}}, "step", None),
        ({"input_quant": {"axis": 1}}, "no product can take out", None),
        ({"input_quant": {"axis": -1}}, "tokens differ: set dynamic", None),
        ({"input_quant": {"type": "fpe4m3", "symmetric": False}}, "has no zero point", None),
        ({"input_quant": {"symmetric": False, "dual_scale": True}}, "symmetric integers", None),
        ({"weight_quant": {"dynamic": True}}, "weights do not change", None),
        ({"calib": {"percdamp": 0.1}}, "percdamp belong to GPTQ", None),
        ({"calib": {"type": "gptq", "groupsize": 0}}, "groupsize is -1", None),
        ({"calib": {"type": "gptq", "groupsize": 32, "static_groups": False}}, "static_groups cannot be off", None),
        ({"calib": {"type": "gptq"}, "weight_quant": {"symmetric": False}}, "GPTQ rounds to symmetric", None),
        ({"calib": {"type": "gptq"}, "weight_quant": {"type": "fp16"}}, "nothing to round", None),
        ({"calib": {"search_range": True}, "weight_quant": {"symmetric": False}}, "search_range looks", None),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(settings: dict[str, Any], message: str, hint: str | None) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Configuration({"default": settings})
    assert message in str(caught.value)
    if hint is not None:
        assert hint in (caught.value.hint or "")


def test_patterns_are_searched_once() -> None:
    with pytest.raises(ConfigurationError, match="patterns are searched once"):
        Configuration({"default": {}, "*.q": {"search_patterns": []}})
    with pytest.raises(ConfigurationError, match="a configuration is a dictionary"):
        Configuration([])  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"'\*\.q\.opt\.rank'"):
        Configuration({"default": {}, "*.q": {"opt": {"rank": 3}}})
