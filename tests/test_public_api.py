from __future__ import annotations

import subprocess
import sys

import pytest

import qwodel

HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "pydantic",
    "typer",
    "rich",
    "huggingface_hub",
    "llama_cpp",
    "gguf",
    "datasets",
)


def _imported_by(code: str) -> set[str]:
    show = f"import sys; {code}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_every_public_name_loads() -> None:
    for name in qwodel.__all__:
        assert getattr(qwodel, name) is not None
    assert dir(qwodel) == sorted(qwodel.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        qwodel.nonsense  # noqa: B018


def test_importing_qwodel_imports_nothing_heavy() -> None:
    assert not _imported_by("import qwodel") & {*HEAVY, "qwodel.exceptions", "importlib.metadata"}


def test_help_imports_no_framework() -> None:
    code = "from qwodel.cli.main import app\ntry:\n app(['--help'])\nexcept SystemExit: pass\nimport sys"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('MODULES', *sorted(sys.modules))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported = set(done.stdout.split("MODULES")[1].split())
    assert not imported & {
        "torch",
        "transformers",
        "numpy",
        "pydantic",
        "huggingface_hub",
        "llama_cpp",
        "gguf",
        "datasets",
    }


def test_the_facade_has_the_documented_signature() -> None:
    import inspect

    parameters = inspect.signature(qwodel.Quantizer).parameters
    assert list(parameters) == ["backend", "model_path", "output_dir", "progress_callback", "backend_kwargs"]
    assert parameters["output_dir"].default == "./quantized_models"
    names = list(inspect.signature(qwodel.quantize).parameters)
    assert names == ["model_path", "output_dir", "backend", "format", "progress_callback", "kwargs"]
