from __future__ import annotations

import pytest

import qwodel.segquant


def test_every_public_name_loads() -> None:
    for name in qwodel.segquant.__all__:
        assert getattr(qwodel.segquant, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        qwodel.segquant.nonsense  # noqa: B018
