"""What comes from outside, read in one place each: paths, regular files, JSON and numbers.

Nothing here blocks, recurses with its input, or takes more memory than a small multiple of the file's
size. Whatever is wrong ends in the caller's kind of :class:`~qwodel.exceptions.QuantizationError`;
only ``MemoryError`` passes through, for whoever knows what to give up.
"""

from __future__ import annotations

from qwodel.untrusted.files import checked_path, kind_of, open_regular, read_regular
from qwodel.untrusted.json_text import MAX_DEPTH, MAX_JSON, parse_json, read_json, read_json_object
from qwodel.untrusted.values import checked_int, checked_number, foreign_errors

__all__ = [
    "MAX_DEPTH",
    "MAX_JSON",
    "checked_int",
    "checked_number",
    "checked_path",
    "foreign_errors",
    "kind_of",
    "open_regular",
    "parse_json",
    "read_json",
    "read_json_object",
    "read_regular",
]
