"""Text from outside, made safe to show: names in files, messages of toolchains, paths, anything a file can say.

Raw, it could move the cursor, rename the window, paint over what was printed, or read as something else than
it is (https://trojansource.codes). Every verb, error and log line of the command line passes through here.
"""

from __future__ import annotations

import unicodedata

__all__ = ["shown", "shown_lines"]

_LONGEST = 2_000
_LONGEST_LINES = 40_000
# Control characters; formats, with all that turns the direction or has no width; lone surrogates; line breaks.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\x1b": "\\x1b"}


def shown(value: object, limit: int = _LONGEST) -> str:
    """Return the text of ``value`` on one line: what no terminal should get is escaped, what is too long is cut.

    Args:
        value: anything; :class:`str` is called on it.
        limit: characters kept of it; more leave ``…`` and their number.
    """
    text = str(value)
    cut = ""
    if len(text) > limit:
        text, cut = text[:limit], f"… ({len(text) - limit:,} characters more)"
    return (text if text.isascii() and text.isprintable() else "".join(map(_escaped, text))) + cut


def shown_lines(value: object, limit: int = _LONGEST_LINES) -> str:
    """Return the text of ``value`` as :func:`shown` does, with its lines kept; those after the first are indented.

    So a name with a line break in it cannot pass for a line of ours.
    """
    lines = str(value)[:limit].replace("\r\n", "\n").split("\n")
    return "\n  ".join(shown(line, limit) for line in lines)


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _UNSAFE:
        return character
    if character in _NAMED:
        return _NAMED[character]
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
