from __future__ import annotations

import torch
from torch import nn

from qwodel.segquant import quantize_model


class Standardized(nn.Conv2d):
    """Its weight is not what it multiplies with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Renamed(nn.Linear):
    """A plain linear layer in all but name."""


def test_a_subclass_with_its_own_forward_is_kept_and_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Standardized(2, 4, 3), nn.Flatten(), Renamed(16, 4)).eval()
    kept = model[0]
    report = quantize_model(model, [(torch.randn(2, 2, 4, 4),)], {"default": {"conv": True}})
    assert model[0] is kept
    assert report.kept["0"] == "Standardized computes in a way of its own"
    assert not isinstance(model[2], nn.Linear)
