"""Kills at random moments: what a user finds after ``kill -9``, and after the run that follows.

For every kill a process that has its imports done forks, and the child starts a run of a backend on a one-layer
model and is killed (SIGKILL; every third time with all it has started) at a moment drawn evenly over the time that a whole run
takes, publishing included. Half of the runs replace an older output. Then:

- *partial*: outputs in their place that are not whole, the older one or the new one: by the hashes in their
  manifests, every file of them. A single file whose manifest is already that of the other is *told*: the
  manifest says that it is not its own.
- *completes*: the same run again ends well, and every file has the hash its manifest gives.
- *left over*: anything in the output directory then but the output and its manifest, hidden or not.

Needs the directory of a small Llama (``stories15M``), and every extra. Prints one table::

    python benchmarks/kills.py MODEL                     # 200 kills
    python benchmarks/kills.py MODEL --kills 20 --seed 7 --only gguf int8
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwodel.hashes import check_outputs, describes, manifest_beside

SHARES = {"int8": 40, "fp8": 40, "gguf": 44, "smoothquant": 26, "segquant": 24, "coreml": 16, "awq": 10}
FORMATS = {
    "int8": "int8_row", "fp8": "fp8_e4m3", "gguf": "Q8_0", "smoothquant": "w8a8_dynamic", "segquant": "w8a8",
    "coreml": "int8_linear", "awq": "int4",
}  # fmt: skip
_TEXT = "Once upon a time there was a dog who met a cat in the garden and they played all day. " * 80


@dataclass
class Tally:
    kills: int = 0
    late: int = 0
    replacing: int = 0
    partial: int = 0
    told: int = 0
    completes: int = 0
    left_over: int = 0
    problems: list[str] = field(default_factory=list)


def options_of(backend: str, scratch: Path) -> dict[str, Any]:
    """The options that make a run short."""
    text = {"calibration_dataset": str(scratch / "text.txt"), "num_samples": 4, "seq_length": 32}
    inputs = [{"class_labels": [1, 2]}, {"class_labels": [3, 0]}]
    return {
        "smoothquant": {**text, "alpha": 0.5, "rotations": "none"},
        "segquant": {
            "calibration_inputs": inputs, "timesteps_per_sample": 2, "alpha": 0.5, "low_rank": 4,
            "pipeline_arguments": {"num_inference_steps": 3, "guidance_scale": 1.0},
        },
        "coreml": {"seq_length": 16, "input_shape": [1, 8], "workers": 1},
        "awq": {**text, "group_size": 32},
    }.get(backend, {})  # fmt: skip


def small_models(model: Path, folder: Path, *, change: float) -> None:
    """One layer of the model, and a pipeline of a tiny DiT, whose weights ``change`` makes others."""
    import diffusers
    import torch
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, num_hidden_layers=1)
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=8,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in (*made.parameters(), *transformer.parameters()):
            parameter.mul_(change)
    made.save_pretrained(folder / "model")
    for file in model.glob("tokenizer*"):
        shutil.copyfile(file, folder / "model" / file.name)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler()).save_pretrained(folder / "pipeline")


class Runs:
    """A process that has a backend's imports done and forks a child for every run it is told of."""

    def __init__(self, backend: str, log: Path) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", backend]
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        assert self._answer() == "ready", f"see {log}"

    def start(self, request: dict[str, Any]) -> int:
        """Start a run; return its process."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        # A run that was killed as it ended may have said so.
        while not (answer := self._answer()).startswith("started "):
            pass
        return int(answer.split()[1])

    def run(self, request: dict[str, Any]) -> tuple[float, str]:
        """Carry out a whole run; return its seconds, and ``done`` or an error."""
        started, process = time.monotonic(), self.start(request)
        while not (answer := self._answer()).startswith(f"{process} "):
            pass
        return time.monotonic() - started, answer.partition(" ")[2]

    def kill(self, process: int, *, group: bool) -> None:
        """Kill a run, with or without what it has started, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL) if group else os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(process, 0)
                time.sleep(0.005)

    def end(self) -> None:
        self._process.communicate()
        self._log.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended; see its log"
        return line.strip()


def work(backend: str) -> None:
    """That process: fork for every request until there are none."""
    import logging

    logging.disable(logging.CRITICAL)
    answers = os.dup(1)
    os.dup2(2, 1)  # what toolchains print is no answer
    _import_all(backend)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(answers, b"ready\n")
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(reader, 1)  # until the parent has said who this is
            _run(backend, json.loads(line), answers)
        os.write(answers, f"started {child}\n".encode())
        os.write(writer, b"x")
        os.close(reader)
        os.close(writer)


def _run(backend: str, request: dict[str, Any], answers: int) -> None:
    from qwodel import Quantizer

    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        quantizer = Quantizer(backend, request["model"], request["out"], **request["options"])
        quantizer.quantize(request["format"])
        said = "done"
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    os.write(answers, f"{os.getpid()} {said}\n".encode())
    os._exit(0)


def _import_all(backend: str) -> None:
    """What a run imports, so that kills do not fall into imports most of the time."""
    import torch  # noqa: F401

    from qwodel.backends import load_backend

    load_backend(backend)
    if backend != "gguf":
        import transformers.models.llama.modeling_llama  # noqa: F401
    if backend == "coreml":
        import coremltools  # noqa: F401
    if backend == "awq":
        import llmcompressor  # noqa: F401
    if backend == "segquant":
        import diffusers.pipelines.dit.pipeline_dit  # noqa: F401


def outputs_in(out: Path) -> list[Path]:
    """What stands in an output directory, but for manifests and what is hidden."""
    return [
        path
        for path in out.glob("*")
        if not path.name.startswith(".") and not path.name.endswith(".manifest.json")
    ]


def is_whole(path: Path) -> bool:
    """Whether every file of an output has the hash that its manifest gives."""
    if path.is_file():
        return describes(manifest_beside(path), path)
    try:
        outputs = json.loads((path / "qwodel.manifest.json").read_text("utf-8"))["outputs"]
    except (OSError, ValueError, KeyError):
        return False
    return not check_outputs(path, outputs)


def judge(path: Path, old: dict[str, bytes], tally: Tally) -> None:
    """Count an output found after a kill as whole, told, or partial."""
    if is_whole(path):
        return
    # The older file, byte for byte, under the new manifest: the second of two renames is missing.
    if path.is_file() and old.get(path.name) == path.read_bytes():
        tally.told += 1
        return
    tally.partial += 1
    tally.problems.append(f"{path.name} is neither the older output nor the new one")


def one_kill(
    backend: str, runs: Runs, request: dict[str, Any], seconds: float, chance: random.Random, tally: Tally,
    older: Path,
) -> None:  # fmt: skip
    out = Path(request["out"])
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    replacing = chance.random() < 0.5
    if replacing:
        shutil.copytree(older, out, dirs_exist_ok=True)
    old = {path.name: path.read_bytes() for path in outputs_in(out) if path.is_file()}
    request = {**request, "options": {**request["options"], "overwrite": True}}
    moment, group = chance.uniform(0, seconds * 1.05), tally.kills % 3 == 0
    victim = runs.start(request)
    time.sleep(moment)
    runs.kill(victim, group=group)
    tally.kills += 1
    tally.replacing += replacing
    tally.late += not any(out.glob(".qwodel-*"))
    for path in outputs_in(out):
        judge(path, old, tally)
    _, said = runs.run(request)
    found = outputs_in(out)
    if said == "done" and len(found) == 1 and is_whole(found[0]):
        tally.completes += 1
    else:
        tally.problems.append(f"{backend}: the second run: {said}")
    expected = {found[0], manifest_beside(found[0])} if found and found[0].is_file() else set(found)
    if extra := [path.name for path in out.iterdir() if path not in expected]:
        tally.left_over += 1
        tally.problems.append(f"{backend}: left over: {extra}")


def kills(backend: str, count: int, scratch: Path, chance: random.Random) -> Tally:
    """Kill ``count`` runs of one backend."""
    tally, log = Tally(), scratch / f"{backend}.log"
    options = options_of(backend, scratch)
    kind = "pipeline" if backend == "segquant" else "model"
    request = {
        "model": str(scratch / "older-models" / kind),
        "out": str(scratch / "older" / backend),
        "format": FORMATS[backend],
        "options": options,
    }
    runs = Runs(backend, log)
    seconds, said = runs.run(request)
    assert said == "done", said
    request["out"] = str(scratch / "out" / backend)
    Path(request["out"]).parent.mkdir(exist_ok=True)
    for _ in range(count):
        one_kill(backend, runs, request, seconds, chance, tally, scratch / "older" / backend)
    runs.end()
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="directory of a small Llama, such as stories15M")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=SHARES, default=list(SHARES))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker)
        return
    total = sum(SHARES[name] for name in given.only)
    counts = {name: max(1, round(given.kills * SHARES[name] / total)) for name in given.only}
    print(f"seed {given.seed}, {sum(counts.values())} kills\n")
    head = ("backend", "kills", "replacing", "nothing staged", "partial", "told", "completes", "left over")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)
    sums = [0] * (len(head) - 1)
    problems = []
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        (Path(folder) / "text.txt").write_text(_TEXT)
        small_models(given.model, Path(folder) / "older-models", change=0.9)
        small_models(given.model, Path(folder) / "models", change=1.0)
        for name, count in counts.items():
            tally = kills(name, count, Path(folder), random.Random(f"{given.seed} {name}"))
            row = [
                tally.kills, tally.replacing, tally.late, tally.partial, tally.told, tally.completes, tally.left_over,
            ]  # fmt: skip
            sums = [a + b for a, b in zip(sums, row, strict=True)]
            problems += tally.problems
            print(f"| {name} | " + " | ".join(map(str, row)) + " |", flush=True)
    print("| all | " + " | ".join(map(str, sums)) + " |")
    print(*problems, sep="\n")


if __name__ == "__main__":
    main()
