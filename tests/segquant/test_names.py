from __future__ import annotations

import subprocess
import sys

import pytest

import qwodel.segquant


def test_every_public_name_loads() -> None:
    for name in qwodel.segquant.__all__:
        assert getattr(qwodel.segquant, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        qwodel.segquant.nonsense  # noqa: B018


@pytest.mark.parametrize(
    "before", ["import qwodel.segquant.quantize", "from qwodel.segquant import quantize_model", "pass"]
)
def test_quantize_is_the_function_whatever_was_imported_before(before: str) -> None:
    code = f"{before}\nfrom qwodel.segquant import quantize\nassert quantize.__name__ == 'quantize' and callable(quantize)"
    subprocess.run([sys.executable, "-c", code], check=True)
