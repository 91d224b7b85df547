"""The spec's place of ``evaluate_ppl``, and ``python -m qwodel.smoothquant.ppl_eval``; see :mod:`qwodel.smoothquant.commands`."""

from __future__ import annotations

from qwodel.smoothquant.commands import ppl_eval_main
from qwodel.smoothquant.evaluate import evaluate_ppl

__all__ = ["evaluate_ppl"]

if __name__ == "__main__":
    ppl_eval_main()
