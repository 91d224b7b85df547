"""Damaged and hostile files against every place that reads one; prints the table of docs/reliability.md.

A case is a seed: ``--seed`` and the case's number give the same file again. What may come out is a result
or a ``QuantizationError``; anything else is untyped, and is listed below the table with its number. Each
entry point has a process of its own; the peak is what its cases added to that process. A case counts as
over 1 s by processor time, so that a busy machine does not, or when it waits for ten; it hangs after 60.

    python benchmarks/fuzz.py [--cases 20000] [--seed 0] [--only "LoRA adapters"]
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SLOW, WAIT, HANG, PREPARE = 1.0, 10.0, 60.0, 600.0  # seconds: of the processor, then of the clock
PEAK_UNIT = 1 << 20 if sys.platform == "darwin" else 1 << 10


@dataclass
class Outcome:
    """What the cases of one entry point came to; ``faults`` are untyped errors, hangs and crashes."""

    cases: int = 0
    accepted: int = 0
    typed: int = 0
    slow: int = 0
    peak: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000, help="of all entry points together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one entry point")
    arguments = parser.parse_args()
    from tests.hostile.entry_points import ENTRY_POINTS

    names = [name for name in ENTRY_POINTS if arguments.only in (None, name)]
    if not names:
        parser.error(f"--only takes one of: {', '.join(ENTRY_POINTS)}")
    each = -(-arguments.cases // len(names))
    print(f"seed {arguments.seed}, {each * len(names):,} cases\n", flush=True)
    print("| entry point | cases | typed | accepted | untyped or hung | over 1 s | peak MB |")
    print("|---|--:|--:|--:|--:|--:|--:|", flush=True)
    outcomes = {}
    for name in names:
        outcomes[name] = outcome = attack(name, each, arguments.seed)
        row(name, outcome)
    total = Outcome(
        *(sum(getattr(each, key) for each in outcomes.values()) for key in ("cases", "accepted", "typed", "slow")),
        max(each.peak for each in outcomes.values()),
    )  # fmt: skip
    total.faults = [f"{name}, {fault}" for name, each in outcomes.items() for fault in each.faults]
    row("**all**", total)
    print(f"\n{sum(each.seconds for each in outcomes.values()):.0f} s", *total.faults[:40], sep="\n")
    sys.exit(bool(total.faults))


def row(name: str, outcome: Outcome) -> None:
    print(
        f"| {name} | {outcome.cases:,} | {outcome.typed:,} | {outcome.accepted:,} | {len(outcome.faults)} | "
        f"{outcome.slow} | {outcome.peak} |",
        flush=True,
    )


def attack(name: str, cases: int, seed: int) -> Outcome:
    """Run all cases of an entry point, in a new process after each that hangs or dies."""
    context = multiprocessing.get_context("spawn")
    outcome, begun = Outcome(), time.perf_counter()
    while outcome.cases < cases:
        ours, theirs = context.Pipe()
        child = context.Process(target=work, args=(name, range(outcome.cases, cases), seed, theirs))
        child.start()
        theirs.close()
        if not follow(ours, outcome, cases):
            child.kill()
            outcome.faults.append(f"case {outcome.cases}: hung, or its process died")
            outcome.cases += 1
        child.join()
    outcome.seconds = time.perf_counter() - begun
    return outcome


def follow(pipe: Connection, outcome: Outcome, cases: int) -> bool:
    """Take in what the process says; return whether it came to its end."""
    before, patience = outcome.peak, PREPARE
    while outcome.cases < cases:
        try:
            if not pipe.poll(patience):
                return False
            patience = HANG
            kind, seconds, peak, fault = pipe.recv()
        except EOFError:
            return False
        outcome.cases += kind != "ready"
        outcome.accepted += kind == "accepted"
        outcome.typed += kind == "typed"
        outcome.slow += seconds > SLOW
        outcome.peak = max(before, peak)
        if fault:
            outcome.faults.append(fault)
    return True


def work(name: str, cases: range, seed: int, pipe: Connection) -> None:
    """Say ``(kind, seconds, peak MB, fault)`` of each case."""
    import torch

    from qwodel.exceptions import QuantizationError
    from tests.hostile.entry_points import ENTRY_POINTS

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        attempt = ENTRY_POINTS[name](Path(folder))
        attempt_once(attempt)
        start = peak()
        pipe.send(("ready", 0.0, 0, ""))
        for number in cases:
            kind, fault, begun, used = "accepted", "", time.perf_counter(), time.process_time()
            try:
                attempt(random.Random(f"{seed}:{name}:{number}"))
            except QuantizationError:
                kind = "typed"
            except BaseException as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                kind = "untyped"
                fault = f"case {number}: {type(error).__name__} at {place.filename}:{place.lineno}: {error!s:.200}"
            used, waited = time.process_time() - used, time.perf_counter() - begun
            pipe.send((kind, used if waited < WAIT else waited, peak() - start, fault))


def attempt_once(attempt: object) -> None:
    """Import what the first case imports, so that the peak is the cases' own."""
    for number in range(20):
        try:
            attempt(random.Random(number))  # type: ignore[operator]
        except Exception:
            continue


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // PEAK_UNIT


if __name__ == "__main__":
    main()
