from __future__ import annotations

from pathlib import Path

import pytest

from qwodel import Quantizer
from qwodel.backends.gguf.adapter import GGUFQuantizer
from qwodel.backends.gguf.formats import FILE_TYPES, format_specs
from qwodel.exceptions import ConfigurationError, DependencyError, FormatNotSupportedError, ValidationError

DOCUMENTED = [
    "Q4_K_M",
    "Q8_0",
    "Q2_K",
    "Q3_K_M",
    "Q4_0",
    "Q4_K_S",
    "Q5_K_M",
    "Q5_K_S",
    "Q6_K",
    "IQ4_NL",
    "IQ3_M",
]


def test_every_documented_format_and_every_type_of_the_library_is_listed() -> None:
    from llama_cpp import llama_cpp as lib

    assert list(Quantizer.list_formats("gguf"))[: len(DOCUMENTED)] == DOCUMENTED
    numbers = {kind.number for name, kind in FILE_TYPES.items() if name in format_specs()}
    offered = {
        getattr(lib, name)
        for name in dir(lib)
        if name.startswith(("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_"))
    }
    # libllama can read NVFP4 files but has no quantizer for them.
    assert offered - numbers == {lib.LLAMA_FTYPE_MOSTLY_NVFP4}


def test_numbers_are_the_librarys() -> None:
    from llama_cpp import llama_cpp as lib

    for name, kind in FILE_TYPES.items():
        constant = "LLAMA_FTYPE_ALL_F32" if name == "F32" else f"LLAMA_FTYPE_MOSTLY_{name}"
        assert getattr(lib, constant) == kind.number


def test_importance_matrix_needs_follow_the_type() -> None:
    needing = {name for name, spec in format_specs().items() if "importance matrix" in spec.needs}
    assert {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "Q2_K_S"} <= needing
    assert not needing & {"Q2_K", "IQ3_M", "IQ4_NL", "IQ4_XS", "Q4_K_M"}


@pytest.mark.parametrize("text", ["q4_k_m", "Q4-K-M", "q4km", "Q4_K"])
def test_names_fold_case_and_separators(text: str) -> None:
    assert GGUFQuantizer.find_format(text).name == "Q4_K_M"


def test_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises(FormatNotSupportedError, match="no format 'Q4_K_X'") as caught:
        GGUFQuantizer.find_format("Q4_K_X")
    assert "'Q4_K_M'" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("output_tensor_typ", "Q8_0", "no option 'output_tensor_typ'"),
        ("output_tensor_type", "Q9_9", "'Q9_9' is no tensor type"),
        ("tensor_types", {"attn_(": "Q8_0"}, "not a regular expression"),
        ("tensor_types", {"attn_v": "nope"}, "'nope' is no tensor type"),
        ("nthread", -1, "greater than or equal to 0"),
        ("pure", "perhaps", "valid boolean"),
    ],
)
def test_bad_options_are_refused_by_name(stories15m: Path, option: str, value: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Quantizer("gguf", stories15m, **{option: value})


def test_a_token_is_in_no_error_and_no_recipe(stories15m: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Quantizer("gguf", stories15m, token=["hf_secret"])
    assert "hf_secret" not in str(caught.value)
    assert "hf_secret" not in repr(GGUFQuantizer.parse_options({"token": "hf_secret"}))
    assert "token" not in GGUFQuantizer.parse_options({"token": "hf_secret"}).model_dump()


def test_the_converter_is_checked_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwodel.backends.gguf import toolchain

    monkeypatch.setenv("QWODEL_LLAMA_CPP", str(tmp_path))
    with pytest.raises(DependencyError, match=r"has no convert_hf_to_gguf\.py"):
        toolchain.converter()
    archive = tmp_path / "x.tar.gz"
    archive.write_bytes(b"not the archive")
    with pytest.raises(DependencyError, match="SHA-256 .* is locked"):
        toolchain.lay_converter(archive, tmp_path / "laid")
    assert not (tmp_path / "laid").exists()


def test_offline_without_a_converter_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwodel.backends.gguf import toolchain

    monkeypatch.delenv("QWODEL_LLAMA_CPP", raising=False)
    monkeypatch.setenv("QWODEL_CACHE", str(tmp_path))
    monkeypatch.setattr(toolchain, "_CHECKOUT", tmp_path / "none")
    toolchain.lock()
    for name in ("PIP_NO_INDEX",):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DependencyError, match="cannot be fetched: ERROR") as caught:
        toolchain.converter()
    assert "QWODEL_LLAMA_CPP" in (caught.value.hint or "")
    assert not list(tmp_path.rglob("*.py"))


def test_an_unsupported_architecture_is_named_with_its_neighbours() -> None:
    from qwodel.backends.gguf.toolchain import converter

    tool = converter()
    assert tool.check_architecture({"architectures": ["LlamaForCausalLM"]}) == "LlamaForCausalLM"
    nested = {"architectures": ["SomeVisionModel"], "text_config": {"architectures": ["Qwen2ForCausalLM"]}}
    assert tool.check_architecture(nested) == "Qwen2ForCausalLM"
    with pytest.raises(ValidationError, match="does not support the architecture LlamaForCausalXM") as caught:
        tool.check_architecture({"architectures": ["LlamaForCausalXM"]})
    assert "'LlamaForCausalLM'" in (caught.value.hint or "")
    with pytest.raises(ValidationError, match="names no architecture"):
        tool.check_architecture({"hidden_size": 3})


def test_the_architecture_list_is_the_converters_own() -> None:
    import subprocess
    import sys

    from qwodel.backends.gguf.toolchain import converter

    tool = converter()
    done = subprocess.run(
        [sys.executable, str(tool.script), "--print-supported-models"],
        capture_output=True,
        text=True,
        check=True,
    )
    text = done.stderr.split("TEXT models:")[1].split("MMPROJ models:")[0]
    listed = {line.split("- ")[1].strip() for line in text.splitlines() if "- " in line}
    assert listed == set(tool.architectures())
