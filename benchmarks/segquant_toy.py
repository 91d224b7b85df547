"""SegQuant on a stock SD3 transformer: outliers, optima, calibrations, seams and dual scales against each other.

diffusers' ``SD3Transformer2DModel``, 4 blocks of width 192, seeded random weights. As in trained models,
the chunks of its adaLN layers are of unequal size, and a few channels of what modulation gives are large.
Calibration is 40 batches of 4, SQNR is of the model's output on 4 held-out batches of 2. Every row starts
from the same model in the same process. "layers" is the mean SQNR of the layers' own outputs, "SiLU" that of
the layers an activation feeds. Peak memory is what the step adds to the process. Tables::

    python benchmarks/segquant_toy.py                  # all
    python benchmarks/segquant_toy.py --only w4a8 --rows 4
    python benchmarks/segquant_toy.py --only real
"""

from __future__ import annotations

import argparse
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from qwodel.algorithms.gptq import GptqOptions, gptq
from qwodel.algorithms.quant_types import INT4, INT8, ROW
from qwodel.algorithms.scales import quantize_matrix as nearest
from qwodel.modules.segment_linear import SegmentLinear
from qwodel.segquant import QuantizationReport, quantize_model

WIDTH, OUTLIERS, CHUNKS = 192, 3.0, (0.3, 1.0, 3.0, 0.5, 2.0, 1.0)
SEARCH = {"search_alpha_config": {"enable": True, "min": 0.0, "max": 1.0, "step": 0.1}}
GPTQ = {"type": "gptq"}
FORMATS: dict[str, dict[str, Any]] = {
    "w8a8": {"input_quant": {"type": "int8"}, "weight_quant": {"type": "int8"}},
    "w4a8": {
        "input_quant": {"type": "int8", "axis": -1, "dynamic": True},
        "weight_quant": {"type": "int4", "axis": 1},
    },
}
SEAMS = {
    "plain": (False, {"dual_scale": False}),
    "seg": (True, {"dual_scale": False}),
    "dual": (False, {"symmetric": True}),
    "seg+dual": (True, {"symmetric": True}),
    "seg+any": (True, {}),
}
"""Seams, and what may be done about inputs of one sign: nothing, two scales, or also a zero point."""
ROWS: list[tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ("DEFAULT AMAX", {"type": "default"}, {}, ("plain", "seg", "dual", "seg+dual", "seg+any")),
    ("DEFAULT GPTQ", {"type": "default"}, GPTQ, ("plain", "seg+dual")),
    ("SMOOTH .5 AMAX", {"type": "smooth"}, {}, ("plain", "seg+dual")),
    ("SMOOTH .5 GPTQ", {"type": "smooth"}, GPTQ, ("plain", "seg+dual")),
    ("SMOOTH search AMAX", {"type": "smooth", **SEARCH}, {}, ("plain", "seg+dual")),
    ("SMOOTH search GPTQ", {"type": "smooth", **SEARCH}, GPTQ, ("plain", "seg+dual")),
    ("SVD r16 AMAX", {"type": "svd", "low_rank": 16}, {}, ("plain", "seg+dual")),
    ("SVD r16 GPTQ", {"type": "svd", "low_rank": 16}, GPTQ, ("plain", "seg+dual")),
    ("SVD r16 search GPTQ", {"type": "svd", "low_rank": 16, **SEARCH}, GPTQ, ("seg+dual", "seg+any")),
    ("SVD r16 search GPTQ range", {"type": "svd", "low_rank": 16, **SEARCH}, {**GPTQ, "search_range": True}, ("plain", "seg+dual", "seg+any")),
    ("SVD r32 search GPTQ range", {"type": "svd", "low_rank": 32, **SEARCH}, {**GPTQ, "search_range": True}, ("seg+dual", "seg+any")),
]  # fmt: skip


def toy(seed: int = 0) -> SD3Transformer2DModel:
    """The model."""
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=32, num_attention_heads=6,
        joint_attention_dim=128, caption_projection_dim=WIDTH, pooled_projection_dim=96, out_channels=4,
        pos_embed_max_size=24,
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and (".norm1" in name or name.startswith("norm_out")):
                _unequal(layer, generator)
    return model


def _unequal(layer: nn.Linear, generator: torch.Generator) -> None:
    """Chunks of shift, scale and gate of unequal size; four large channels in each shift and scale."""
    count = layer.out_features // WIDTH
    for index, (weight, bias) in enumerate(
        zip(layer.weight.chunk(count), layer.bias.chunk(count), strict=True)
    ):
        weight.mul_(CHUNKS[index % len(CHUNKS)])
        if index % 3 != 2:
            places = torch.randperm(WIDTH, generator=generator)[:4]
            signs = torch.randint(0, 2, (4,), generator=generator) * 2 - 1
            bias[places] += OUTLIERS * signs


def data(batches: int, size: int, seed: int) -> list[dict[str, Any]]:
    """Keyword arguments of the model's calls."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(0.5 * torch.randn(128, generator=torch.Generator().manual_seed(5)))
    return [
        {
            "hidden_states": torch.randn(size, 4, 16, 16, generator=generator),
            "encoder_hidden_states": torch.randn(size, 24, 128, generator=generator) * spread,
            "pooled_projections": torch.randn(size, 96, generator=generator),
            "timestep": torch.rand(size, generator=generator) * 1000,
            "return_dict": False,
        }
        for _ in range(batches)
    ]


@torch.no_grad()
def outputs(model: nn.Module, batches: list[dict[str, Any]]) -> torch.Tensor:
    """All outputs, flat."""
    return torch.cat([model(**batch)[0].flatten() for batch in batches])


def sqnr(found: torch.Tensor, exact: torch.Tensor) -> float:
    """dB."""
    return float(10 * (exact.square().sum() / (found - exact).square().sum()).log10())


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds, and MB by which resident memory rose at its highest, sampled every few milliseconds."""
    found: dict[str, float] = {}
    before, peak, stop = _resident(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], _resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    started = time.perf_counter()
    try:
        yield found
    finally:
        found["s"] = time.perf_counter() - started
        stop.set()
        thread.join()
        found["MB"] = (max(peak[0], _resident()) - before) / 1e6


def _resident() -> float:
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def fed(report: QuantizationReport, names: set[str] | None = None) -> float:
    """Mean SQNR of layers."""
    found = [each.sqnr for each in report.layers if names is None or each.name in names]
    return sum(found) / len(found)


def table(name: str, rows: list[Any], calibration: Any, held: Any) -> None:
    """One format's rows."""
    model = toy()
    exact = outputs(model, held)
    activated: set[str] = set()
    plain = 0.0
    print(
        f"\n{name}: {'weights a tensor, inputs static a tensor' if name == 'w8a8' else 'weights a channel, inputs dynamic a token'}"
    )
    print(f"{'':28}{'seams':>10}{'SQNR':>8}{'gain':>7}{'layers':>8}{'SiLU':>7}{'s':>7}{'MB':>6}")
    for label, opt, calib, variants in rows:
        for seams in variants:
            seg, signs = SEAMS[seams]
            settings = deepcopy(FORMATS[name])
            settings["input_quant"] |= signs
            patterns = ["linear2chunk", "linear2split", "concat2linear", "stack2linear", "reshape2linear"]
            wanted = (patterns if seg else []) + ["activation2linear"]
            copy = deepcopy(model)
            with watched() as spent:
                report = quantize_model(
                    copy,
                    calibration,
                    {"default": {**settings, "opt": opt, "calib": calib, "search_patterns": wanted}},
                )
            if report.patterns is not None:
                activated = set(report.patterns.activations())
            found = sqnr(outputs(copy, held), exact)
            plain = plain or found
            print(
                f"{label:28}{seams:>10}{found:8.2f}{found - plain:+7.2f}{fed(report):8.2f}"
                f"{fed(report, activated):7.2f}{spent['s']:7.1f}{spent['MB']:6.0f}",
                flush=True,
            )


def single_layer() -> None:
    """A layer behind a SiLU, INT8 a tensor: one scale against two, on rows that were not calibrated on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.SiLU(), nn.Linear(384, 384))
    calibration = [(torch.randn(64, 384),) for _ in range(16)]
    held = torch.randn(1024, 384)
    with torch.no_grad():
        exact = model(held)
    print("\none layer behind SiLU, INT8 a tensor, SQNR in dB")
    for label, opt in (
        ("DEFAULT", {"type": "default"}),
        ("SMOOTH .5", {"type": "smooth", "keep_best": False}),
    ):
        line = f"{label:12}"
        kinds = {
            "one scale": {"dual_scale": False},
            "dual": {"symmetric": True},
            "zero point": {"symmetric": False},
        }
        for kind, signs in kinds.items():
            copy = deepcopy(model)
            quantize_model(copy, calibration, {"default": {"opt": opt, "input_quant": signs}})
            with torch.no_grad():
                line += f"  {kind} {sqnr(copy(held), exact):6.2f}"
        print(line)


def rounding() -> None:
    """GPTQ against rounding to nearest on ill-conditioned inputs; relative error on other rows."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(256, 256, generator=generator))[0]
    spread = basis * torch.logspace(0, -3, 256) @ basis.T
    fit, held = (torch.randn(rows, 256, generator=generator) @ spread for rows in (4096, 1024))
    weight = torch.randn(256, 256, generator=generator)
    exact = held @ weight.T
    print("\nGPTQ, ill-conditioned inputs, relative squared error of outputs on other rows")
    hessian = fit.T @ fit
    for kind in (INT4, INT8):
        ordered, plain = GptqOptions(damping=0.01), GptqOptions(damping=0.01, act_order=False)
        found = {
            "nearest": nearest(weight, kind, ROW).dequantize(),
            "textbook": textbook(weight, hessian, int(kind.qmax)),
            "ours": gptq(weight, kind, ROW, hessian, plain).quantized.dequantize(),
            "ours with act-order": gptq(weight, kind, ROW, hessian, ordered).quantized.dequantize(),
        }
        energy = float(exact.square().sum())
        errors = {
            name: float((held @ each.T - exact).square().sum()) / energy for name, each in found.items()
        }
        print(f"{kind.name:6}" + "  ".join(f"{name} {error:.2e}" for name, error in errors.items()))


def textbook(weight: torch.Tensor, hessian: torch.Tensor, qmax: int) -> torch.Tensor:
    """GPTQ as published: rows with absmax scales, columns in order, 1 % damping."""
    work = weight.double().clone()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    scale = work.abs().amax(1) / qmax
    rounded = torch.empty_like(work)
    for column in range(work.shape[1]):
        rounded[:, column] = (work[:, column] / scale).round().clamp(-qmax, qmax) * scale
        error = (work[:, column] - rounded[:, column]) / upper[column, column]
        work[:, column:] -= error[:, None] * upper[column, column:]
    return rounded.float()


def real(calibration: Any, batch: int, repeats: int) -> None:
    """The model in INT8 arithmetic against bf16 and fp32, in turns."""
    model = toy()
    inputs = data(1, batch, 13)[0]
    half = deepcopy(model).to(torch.bfloat16)
    cast = {key: each.bfloat16() if isinstance(each, torch.Tensor) else each for key, each in inputs.items()}
    settings = {"real_quant": True, "opt": {"type": "smooth", **SEARCH}}
    int8 = deepcopy(model)
    quantize_model(int8, calibration[:8], {"default": {**FORMATS["w8a8"], **settings}})
    best = dict.fromkeys(("fp32", "bf16", "int8"), (float("inf"), 0.0))
    with torch.no_grad():
        for _ in range(repeats):
            for name, runs, given in (("fp32", model, inputs), ("bf16", half, cast), ("int8", int8, inputs)):
                best[name] = min(best[name], _timed(runs, given))
    print(
        f"\nthe model at batch {batch}, {torch.get_num_threads()} threads, least ms of {repeats} runs in turns"
    )
    print(f"{'':6}{'all':>8}{'linear':>9}{'other':>8}")
    for name, (whole, linear) in best.items():
        print(f"{name:6}{whole * 1e3:8.1f}{linear * 1e3:9.1f}{(whole - linear) * 1e3:8.1f}")
    ratio = best["bf16"][0] / best["int8"][0]
    print(
        f"int8 is {ratio:.2f} times as fast as bf16 and {best['fp32'][0] / best['int8'][0]:.2f} times as fp32;"
    )
    print(
        f"with linear layers that take no time it would be {best['bf16'][0] / (best['int8'][0] - best['int8'][1]):.2f} times as fast as bf16"
    )


def _timed(model: nn.Module, given: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a run, and of its linear layers."""
    spent, started = [0.0], [0.0]

    def before(*_: Any) -> None:
        started[0] = time.perf_counter()

    def after(*_: Any) -> None:
        spent[0] += time.perf_counter() - started[0]

    layers = [each for each in model.modules() if isinstance(each, nn.Linear | SegmentLinear)]
    hooks = [each.register_forward_pre_hook(before) for each in layers]
    hooks += [each.register_forward_hook(after) for each in layers]
    start = time.perf_counter()
    model(**given)
    whole = time.perf_counter() - start
    for each in hooks:
        each.remove()
    return whole, spent[0]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=[*FORMATS, "layer", "gptq", "real"], nargs="+")
    parser.add_argument("--rows", type=int, help="the first row, and so many of the last")
    parser.add_argument("--threads", type=int, help="torch's; its own choice if not given")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    wanted = given.only or [*FORMATS, "layer", "gptq", "real"]
    calibration, held = data(40, 4, 11), data(4, 2, 12)
    rows = ROWS if given.rows is None else [ROWS[0], *ROWS[len(ROWS) - given.rows :]]
    for name in FORMATS:
        if name in wanted:
            table(name, rows, calibration, held)
    if "layer" in wanted:
        single_layer()
    if "gptq" in wanted:
        rounding()
    if "real" in wanted:
        real(calibration, 8, 15)


if __name__ == "__main__":
    main()
