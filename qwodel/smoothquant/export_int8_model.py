"""``python -m qwodel.smoothquant.export_int8_model``; see :mod:`qwodel.smoothquant.commands`."""

from __future__ import annotations

from qwodel.smoothquant.commands import main_of

if __name__ == "__main__":
    main_of("export-int8-model")
