"""TorchScript files and exported programs; and operations of the evaluator that transformers do not use."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qwodel import Quantizer
from qwodel.backends.coreml.mil.weight_file import unpack_bits
from qwodel.backends.coreml.options import CoreMLOptions
from qwodel.backends.coreml.programs import load_program
from qwodel.exceptions import ConfigurationError, ConversionError, ValidationError
from qwodel.source import inspect_source
from tests.backends.coreml.runs import make


class Network(nn.Module):
    """Convolutions in all manners, pooling, batch norm, an upper triangle, a slice and a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 32, 3, padding=2, dilation=2, groups=4)
        self.average, self.most = nn.AvgPool2d(2), nn.MaxPool2d(3, stride=2, padding=1)
        self.head = nn.Linear(32, 64)
        self.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
        self.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.nn.functional.leaky_relu(self.norm(self.first(x)), 0.1)
        x = self.most(self.average(self.second(x)))
        flat = torch.nn.functional.softplus(self.head(x.flatten(2).transpose(1, 2)))
        upper = torch.triu(flat @ flat.transpose(1, 2))
        return torch.stack([upper.cumsum(-1), upper.clamp(0.1, 3)], 1), flat[:, ::2].amax(-1, keepdim=True)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Network().eval()


def test_a_torchscript_file(network: nn.Module, tmp_path: Path) -> None:
    example = torch.randn(1, 3, 32, 32)
    torch.jit.trace(network, example).save(str(tmp_path / "net.pt"))
    assert inspect_source(tmp_path / "net.pt").input_format == "torchscript"
    made = make(
        tmp_path / "net.pt",
        tmp_path / "out",
        "float16",
        example_inputs=example,
        weight_threshold=512,
        trust_program=True,
    )
    assert made.info["evaluated"]["relative_error"] < 5e-3
    other = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = network(other)
    found = list(made.run(**{next(iter(made.program.inputs)): other}).values())
    for mine, theirs in zip(found, wanted, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 5e-3


def test_example_inputs_from_files(network: nn.Module, tmp_path: Path) -> None:
    torch.jit.trace(network, torch.randn(1, 3, 32, 32)).save(str(tmp_path / "net.pt"))
    torch.save([torch.randn(1, 3, 32, 32)], tmp_path / "inputs.pt")
    np.savez(tmp_path / "inputs.npz", x=np.ones((1, 3, 32, 32), np.float32))
    for file in ("inputs.pt", "inputs.npz"):
        made = make(
            tmp_path / "net.pt", tmp_path / file.replace(".", "-"), "int8_symmetric",
            example_inputs=tmp_path / file, weight_threshold=512, trust_program=True,
        )  # fmt: skip
        assert made.info["compressed"] == {"constexpr_affine_dequantize": 2}
        assert made.info["evaluated"]["cosine"] > 0.99


def test_an_exported_program_brings_its_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 32)).eval()
    torch.export.save(torch.export.export(module, (torch.randn(2, 64),)), tmp_path / "m.pt2")
    assert inspect_source(tmp_path / "m.pt2").input_format == "exported"
    made = make(tmp_path / "m.pt2", tmp_path / "out", "int4", group_size=8, trust_program=True)
    assert made.info["evaluated"]["cosine"] > 0.95
    assert set(made.info["sqnr_db"]) == {"0.weight", "3.weight"}


def test_a_program_without_inputs_is_refused_before_work(network: nn.Module, tmp_path: Path) -> None:
    torch.jit.trace(network, torch.randn(1, 3, 32, 32)).save(str(tmp_path / "net.pt"))
    with pytest.raises(ConfigurationError, match="needs example_inputs") as caught:
        Quantizer("coreml", tmp_path / "net.pt", tmp_path / "out", trust_program=True).quantize("float16")
    assert "input_shape" in (caught.value.hint or "")
    for given, message in (
        (str(tmp_path / "none.pt"), "does not exist"),
        ({"y": torch.ones(1)}, "example_inputs has y, and the program takes x"),
        ([torch.ones(1), torch.ones(1)], "has 2 tensors, and the program takes 1"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            make(tmp_path / "net.pt", tmp_path / "out", "float16", example_inputs=given, trust_program=True)
    assert not (tmp_path / "out").exists()


class _Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_an_exported_program_is_opened_only_where_it_is_trusted(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(4, 4), (torch.ones(2, 4),)), tmp_path / "plain.pt2")
    pickled = io.BytesIO()
    torch.save(_Runs(tmp_path / "ran"), pickled)
    with (
        zipfile.ZipFile(tmp_path / "plain.pt2") as plain,
        zipfile.ZipFile(tmp_path / "evil.pt2", "w") as evil,
    ):
        for name in plain.namelist():
            changed = name.endswith("sample_inputs/model.pt")
            evil.writestr(name, pickled.getvalue() if changed else plain.read(name))
    with pytest.raises(ValidationError, match="unpickles its sample inputs") as caught:
        make(tmp_path / "evil.pt2", tmp_path / "out", "float16")
    assert "-O trust_program=true" in (caught.value.hint or "")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValidationError, match="can run code"):
        load_program(inspect_source(tmp_path / "evil.pt2"), CoreMLOptions())


class _Writes(nn.Module):
    """A TorchScript module may write any file, here as it is loaded."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = mark

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.mark, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.mark = state[0]
        self.training = state[1]
        torch.save(torch.ones(1), self.mark)


def test_torchscript_is_opened_only_where_it_is_trusted(tmp_path: Path) -> None:
    mark, file = tmp_path / "written", tmp_path / "net.pt"
    torch.jit.script(_Writes(str(mark))).save(str(file))
    with pytest.raises(ValidationError, match="may write and read files") as caught:
        make(file, tmp_path / "out", "float16", input_shape=(1, 8))
    assert "trust_program=True" in (caught.value.hint or "")
    with pytest.raises(ValidationError, match="can run code"):
        load_program(inspect_source(file), CoreMLOptions())
    assert not mark.exists()
    # Why it has to be refused: torch has no way to open it without this.
    torch.jit.load(file)
    assert mark.exists()


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_example_inputs_cannot_run_code(network: nn.Module, tmp_path: Path, suffix: str) -> None:
    torch.jit.trace(network, torch.randn(1, 3, 32, 32)).save(str(tmp_path / "net.pt"))
    file = tmp_path / f"inputs{suffix}"
    if suffix == ".pt":
        torch.save(_Runs(tmp_path / "ran"), file)
    else:
        np.savez(file, x=np.array([_Runs(tmp_path / "ran")], dtype=object))
    for given in (file, tmp_path / "net.pt"):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            make(tmp_path / "net.pt", tmp_path / "out", "float16", example_inputs=given, trust_program=True)
    assert not (tmp_path / "ran").exists()


class _Spectrum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.i0e(x)


def test_an_operator_that_does_not_convert_is_named_with_its_module(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), _Spectrum()))
    torch.jit.trace(module.eval(), torch.randn(1, 8)).save(str(tmp_path / "odd.pt"))
    with pytest.raises(
        ConversionError, match=r"cannot convert the operator special_i0e \(in 1\.1, a _Spectrum\)"
    ) as caught:
        make(tmp_path / "odd.pt", tmp_path / "out", "float16", input_shape=(1, 8), trust_program=True)
    assert "register_torch_op" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


class _Best(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.topk(x, 3).values


def test_an_operation_that_cannot_be_evaluated_is_reported(tmp_path: Path) -> None:
    torch.jit.trace(nn.Sequential(nn.Linear(8, 8), _Best()).eval(), torch.randn(1, 8)).save(
        str(tmp_path / "top.pt")
    )
    made = make(tmp_path / "top.pt", tmp_path / "out", "float16", input_shape=(1, 8), trust_program=True)
    assert made.info["evaluated"] == {"skipped": "the evaluator does not know topk"}
    with pytest.raises(ConversionError, match="does not know topk"):
        make(
            tmp_path / "top.pt",
            tmp_path / "other",
            "float16",
            input_shape=(1, 8),
            evaluate=True,
            trust_program=True,
        )


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_packed_codes_are_read_back(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 1001).astype(np.uint8)
    text = "".join(f"{code:0{bits}b}"[::-1] for code in codes)
    packed = np.array(
        [int(text[at : at + 8].ljust(8, "0")[::-1], 2) for at in range(0, len(text), 8)], np.uint8
    )
    assert (unpack_bits(packed, bits, len(codes)) == codes).all()
