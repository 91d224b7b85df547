"""``python -m qwodel.smoothquant.export_int8_model``; see :mod:`qwodel.smoothquant.commands`."""

from __future__ import annotations

from qwodel.smoothquant.commands import export_int8_model_main

if __name__ == "__main__":
    export_int8_model_main()
