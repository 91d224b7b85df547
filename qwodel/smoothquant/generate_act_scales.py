"""``python -m qwodel.smoothquant.generate_act_scales``; see :mod:`qwodel.smoothquant.commands`."""

from __future__ import annotations

from qwodel.smoothquant.commands import generate_act_scales_main

if __name__ == "__main__":
    generate_act_scales_main()
