from __future__ import annotations

import pytest
import torch

from qwodel.algorithms.fp8_decode import codes_to_float


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_every_code_is_the_number_torch_says(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).reshape(16, 16)
    expected = codes.float()
    found = codes_to_float(codes)
    assert found.dtype == torch.float32
    assert torch.equal(found.isnan(), expected.isnan())
    finite = ~expected.isnan()
    # As bits: −0 is not 0.
    assert torch.equal(found.view(torch.int32)[finite], expected.view(torch.int32)[finite])
    assert torch.equal(codes.view(torch.uint8).flatten(), torch.arange(256, dtype=torch.uint8))
