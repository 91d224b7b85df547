"""Small models with what SegQuant looks for: chunks, joined inputs, activations, outlier channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["Block", "batches", "outputs", "sqnr", "toy"]


class Block(nn.Module):
    """Attention and a gated feed-forward network behind affine norms, modulated by a condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.modulation(functional.silu(condition)).unsqueeze(1).chunk(3, dim=-1)
        h = self.norm1(x)
        x = x + self.o(functional.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        h = self.norm2(x)
        value, gated = self.up(h).chunk(2, dim=-1)
        return x + gate * self.down(value * functional.gelu(gated)) + shift * (1 + scale)


class Toy(nn.Module):
    def __init__(self, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, width, 3, padding=1)
        self.condition = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))
        self.join = nn.Linear(width + 8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 4)

    def forward(self, image: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)
        extra = time[:, None].expand(-1, x.shape[1], -1)
        x = self.join(torch.cat((x, extra), dim=-1))
        condition = self.condition(time)
        for block in self.blocks:
            x = block(x, condition)
        found: torch.Tensor = self.head(x)
        return found


def toy(seed: int = 0) -> Toy:
    """A seeded model whose norms have two large channels, and whose chunks are of unequal size."""
    torch.manual_seed(seed)
    model = Toy().eval().requires_grad_(False)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.norm1.weight[[3, 17]] = 5
        block.norm2.weight[[5, 11]] = -8
        for size, chunk in zip((0.2, 1, 4), block.modulation.weight.chunk(3), strict=True):
            chunk.mul_(size)
    return model


def batches(count: int, size: int = 12, seed: int = 1) -> list[dict[str, Any]]:
    """Keyword arguments of the model's calls."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "image": torch.randn(size, 4, 6, 6, generator=generator),
            "time": 4 * torch.rand(size, 8, generator=generator) - 2,
        }
        for _ in range(count)
    ]


@torch.no_grad()
def outputs(model: nn.Module, given: list[dict[str, Any]]) -> torch.Tensor:
    return torch.cat([model(**each) for each in given])


def sqnr(found: torch.Tensor, exact: torch.Tensor) -> float:
    """dB."""
    return float(10 * (exact.double().square().sum() / (found - exact).double().square().sum()).log10())
