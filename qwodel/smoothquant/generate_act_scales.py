"""``python -m qwodel.smoothquant.generate_act_scales``; see :mod:`qwodel.smoothquant.commands`."""

from __future__ import annotations

from qwodel.smoothquant.commands import main_of

if __name__ == "__main__":
    main_of("generate-act-scales")
