from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qwodel import Quantizer
from qwodel.backends import backend_names, load_backend
from qwodel.exceptions import BackendNotFoundError, DependencyError

ADAPTER = """
from types import MappingProxyType
from qwodel.backends.base import BackendOptions, BaseQuantizer, FormatSpec

class CopyOptions(BackendOptions):
    shout: bool = False

class CopyQuantizer(BaseQuantizer[CopyOptions]):
    name = "copy"
    extra = "copy"
    accepts = frozenset({"safetensors"})
    options_type = CopyOptions

    @classmethod
    def formats(cls):
        return MappingProxyType({"same": FormatSpec("same", "the same bytes", 32.0, "everybody")})

    def output_name(self, source, spec, options):
        return f"{source.name}-{spec.name}.safetensors"

    def run(self, job):
        job.progress.stage("quantize", "copying")
        data = job.source.weight_files[0].read_bytes()
        job.output.path.write_bytes(data)
        job.report["copied"] = len(data)
"""


def test_all_backends_are_listed_installed_or_not() -> None:
    assert {"awq", "coreml", "fp8", "gguf", "int8", "segquant", "smoothquant"} <= set(backend_names())
    assert Quantizer.list_backends() == sorted(backend_names())


def test_names_fold_case_and_unknown_ones_name_the_nearest() -> None:
    assert load_backend(" GGUF ").__name__ == "GGUFQuantizer"
    with pytest.raises(BackendNotFoundError, match="no backend 'gguff'") as caught:
        load_backend("gguff")
    assert caught.value.hint == "did you mean 'gguf'?"
    with pytest.raises(BackendNotFoundError) as caught:
        load_backend("zzzzz")
    assert "known backends: awq, coreml" in (caught.value.hint or "")


def test_a_backend_whose_packages_are_missing_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("qwodel.backends.util.find_spec", lambda name: None)
    with pytest.raises(
        DependencyError, match="awq backend needs llmcompressor, torch, transformers"
    ) as caught:
        Quantizer("awq", tmp_path)
    hint = str(caught.value.hint)
    assert hint.startswith("pip install ")
    assert "'llmcompressor<0.15,>=0.14'" in hint
    assert hint.endswith("(the packages of qwodel[awq])")


def _wheel(folder: Path) -> Path:
    """Build a wheel of a distribution that adds two backends: a good one and one of the wrong kind."""
    path = folder / "qwodel_copy-1.0-py3-none-any.whl"
    points = "[qwodel.backends]\ncopy = qwodel_copy:CopyQuantizer\nwrong = qwodel_copy:MappingProxyType\n"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("qwodel_copy.py", ADAPTER)
        info = "qwodel_copy-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: qwodel-copy\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/entry_points.txt", points)
        wheel.writestr(f"{info}/RECORD", "")
    return path


USE = """
import json, sys
import torch
from safetensors.torch import save_file
from qwodel import Quantizer, BackendNotFoundError
save_file({"w": torch.ones(4)}, "m.safetensors")
quantizer = Quantizer("copy", "m.safetensors", "out", shout=True)
path = quantizer.quantize("SAME")
try:
    Quantizer("wrong", "m.safetensors")
except BackendNotFoundError as error:
    wrong = str(error)
print(json.dumps({"names": Quantizer.list_backends(), "path": str(path), "info": quantizer.get_model_info(),
                  "formats": Quantizer.list_formats("copy"), "wrong": wrong}))
"""


def test_an_installed_distribution_adds_a_backend(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
    ]
    subprocess.run([*command, str(_wheel(tmp_path))], check=True, capture_output=True)
    program = f"import sys; sys.path.insert(0, {str(site)!r})\n{USE}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert {"copy", "gguf"} <= set(seen["names"])
    assert seen["formats"] == {"same": "the same bytes"}
    assert seen["path"] == "out/m-same.safetensors"
    assert (tmp_path / "out" / "m-same.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    assert seen["info"]["copied"] == (tmp_path / "m.safetensors").stat().st_size
    assert "not a subclass" in seen["wrong"]
    manifest = json.loads((tmp_path / "out" / "m-same.manifest.json").read_text())
    assert manifest["recipe"]["shout"] is True
    assert manifest["source"]["sha256"].keys() == {"m.safetensors"}
