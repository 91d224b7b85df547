"""A griffe extension: show Sphinx roles of docstrings (``:class:`X```) as code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([^`]+)`")


class SphinxRoles(Extension):
    """Replaces each role by its target as inline code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the roles in one object's docstring."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
