"""The kernel runs in Triton's interpreter, in a process of its own because that is settled at import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

_PROGRAM = """
import torch
from qwodel.algorithms.gptq import GptqOptions, gptq, solve_block
from qwodel.algorithms.gptq_triton import solve_block_triton, _kernel
from qwodel.algorithms.quant_types import FP8_E4M3, FP8_E5M2, INT8
from triton.runtime.interpreter import InterpretedFunction

assert isinstance(_kernel, InterpretedFunction)
generator = torch.Generator().manual_seed(0)
for quant_type in (INT8, FP8_E4M3, FP8_E5M2):
    for count, rows, wide in ((1, 1, 1), (16, 40, 40), (37, 33, 1), (128, 70, 70)):
        columns = torch.randn(count, rows, generator=generator) * 3
        columns[0, 0] = 0
        factor = torch.randn(count, count, generator=generator).triu() / count
        factor.diagonal().copy_(torch.rand(count, generator=generator) + 0.5)
        scales = (torch.rand(count, wide, generator=generator) + 0.5) / 50
        expected = solve_block(columns.clone(), factor, scales, quant_type)
        found = solve_block_triton(columns.clone(), factor, scales, quant_type)
        for name, a, b in zip(("codes", "errors"), expected, found):
            assert torch.equal(a, b), (quant_type.name, count, rows, name, float((a - b).abs().max()))
print("same")
"""


@pytest.mark.slow
def test_the_kernel_gives_the_codes_of_the_loop():
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "same", done.stderr


def test_what_the_kernel_cannot_hold_goes_to_the_loop():
    import torch

    from qwodel.algorithms.gptq import solve_block
    from qwodel.algorithms.gptq_triton import solve_block_triton
    from qwodel.algorithms.quant_types import INT8

    columns, factor = torch.randn(3, 5, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    scales = torch.full((3, 1), 0.01, dtype=torch.float64)
    expected = solve_block(columns.clone(), factor, scales, INT8)
    found = solve_block_triton(columns.clone(), factor, scales, INT8)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.gpu
def test_codes_on_a_gpu_are_the_same():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from qwodel.algorithms.gptq import gptq
    from qwodel.algorithms.gptq_triton import solve_block_triton
    from qwodel.algorithms.quant_types import FP8_E4M3, INT8, ROW

    weight = torch.randn(512, 1024, device="cuda")
    inputs = torch.randn(4096, 1024, device="cuda") @ torch.randn(1024, 1024, device="cuda")
    for quant_type in (INT8, FP8_E4M3):
        loop = gptq(weight, quant_type, ROW, inputs.T @ inputs).quantized
        turbo = gptq(weight, quant_type, ROW, inputs.T @ inputs, solver=solve_block_triton).quantized
        assert torch.equal(loop.codes.view(torch.uint8), turbo.codes.view(torch.uint8))
