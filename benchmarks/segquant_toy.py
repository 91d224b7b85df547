"""toy draft"""
from __future__ import annotations
import copy, sys, time, torch
from diffusers import SD3Transformer2DModel
from torch import nn

def toy(seed=0):
    torch.manual_seed(seed)
    m = SD3Transformer2DModel(sample_size=16, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=32,
        num_attention_heads=6, joint_attention_dim=128, caption_projection_dim=192, pooled_projection_dim=96,
        out_channels=4, pos_embed_max_size=24).eval()
    g = torch.Generator().manual_seed(seed+1)
    with torch.no_grad():
        for name, p in m.named_parameters():
            if p.ndim == 1: p.add_(torch.randn(p.shape, generator=g)*0.02)
        for name, layer in m.named_modules():
            if isinstance(layer, nn.Linear) and (".norm1" in name or "norm_out" in name):
                chunks = layer.weight.shape[0]//192
                for c, w in enumerate(layer.weight.chunk(chunks)):
                    w.mul_([0.3, 1.0, 3.0, 0.5, 2.0, 1.0][c % 6])
                b = layer.bias
                for c, bb in enumerate(b.chunk(chunks)):
                    if c % 3 != 2:
                        idx = torch.randperm(192, generator=g)[:4]
                        bb[idx] += 8 * (torch.randint(0,2,(4,),generator=g)*2-1)
    return m

def data(n, batch, seed):
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        out.append({"hidden_states": torch.randn(batch,4,16,16,generator=g),
            "encoder_hidden_states": torch.randn(batch,24,128,generator=g)*torch.exp(0.5*torch.randn(128,generator=torch.Generator().manual_seed(5))),
            "pooled_projections": torch.randn(batch,96,generator=g),
            "timestep": torch.rand(batch,generator=g)*1000, "return_dict": False})
    return out

@torch.no_grad()
def sqnr(m, ref, held):
    n=d=0
    for b, r in zip(held, ref):
        y = m(**b)[0]
        n += (y-r).square().sum(); d += r.square().sum()
    return float(10*torch.log10(d/n))
