"""A pickle machine for plain values: nothing that the stream says can run, recurse or allocate at will.

Format: CPython's ``pickletools``, protocols 0 to 5. The interpreter's own unpickler, even with a
restricted ``find_class``, allocates whatever a memo index or a length asks for, and hashes nested tuples
until its stack is gone. This one takes memory in proportion to the stream, and knows what plain data
needs: numbers, strings, tuples, lists, dictionaries, and the few callables its owner hands out.
Sets come as lists; attributes that ``BUILD`` would set are dropped.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from typing import Any

__all__ = ["DamagedPickleError", "PlainUnpickler", "RefusedPickleError"]

_MAX_INTEGER = 256  # bytes
_MAX_LINE = 1000
_SCALARS = (str, int, float, bool, bytes, type(None))
_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}


class DamagedPickleError(ValueError):
    """The stream is no whole pickle."""


class RefusedPickleError(ValueError):
    """The stream asks for something that plain data does not need."""


class PlainUnpickler:
    """Reads pickles one after another from a buffer.

    Args:
        data: the stream.
        find_class: ``(module, name)`` → a callable that makes plain data; raises
            :class:`RefusedPickleError` for all others.
        persistent_load: makes a value of a persistent id.
    """

    def __init__(
        self,
        data: bytes | mmap.mmap,
        find_class: Callable[[str, str], Callable[..., Any]],
        persistent_load: Callable[[Any], Any],
    ) -> None:
        self.position = 0
        self._data, self._find_class, self._persistent_load = data, find_class, persistent_load
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._given: set[int] = set()

    def load(self) -> Any:
        """Return the next pickle's value, and stand behind it.

        Raises:
            DamagedPickleError: the stream ends, or makes no sense.
            RefusedPickleError: it asks for more than plain data.
        """
        self._stack, self._marks, self._memo = [], [], {}
        try:
            return self._run()
        except (IndexError, KeyError, TypeError, struct.error, OverflowError, UnicodeDecodeError) as error:
            if self.position >= len(self._data):
                raise DamagedPickleError("truncated") from error
            raise DamagedPickleError(f"damaged before byte {self.position:,}: {error}") from error

    def _run(self) -> Any:
        # The loop of every byte: locals, and the opcodes of tensors first.
        data, stack, marks, memo = self._data, self._stack, self._marks, self._memo
        position = self.position
        try:
            while True:
                code = data[position]
                position += 1
                if code == 0x71:  # BINPUT
                    memo[data[position]] = stack[-1]
                    position += 1
                elif code == 0x72:  # LONG_BINPUT
                    memo[int.from_bytes(data[position : position + 4], "little")] = stack[-1]
                    position += 4
                elif code == 0x68:  # BINGET
                    stack.append(memo[data[position]])
                    position += 1
                elif code == 0x6A:  # LONG_BINGET
                    stack.append(memo[int.from_bytes(data[position : position + 4], "little")])
                    position += 4
                elif code == 0x4B:  # BININT1
                    stack.append(data[position])
                    position += 1
                elif code == 0x28:  # MARK
                    marks.append(len(stack))
                elif code == 0x74:  # TUPLE
                    start = marks.pop()
                    stack[start:] = [tuple(stack[start:])]
                elif code == 0x58:  # BINUNICODE
                    end = position + 4 + int.from_bytes(data[position : position + 4], "little")
                    stack.append(data[position + 4 : end].decode("utf-8"))
                    position = end
                elif 0x85 <= code <= 0x87:  # TUPLE1, TUPLE2, TUPLE3
                    count = code - 0x84
                    if count > len(stack):
                        raise IndexError("a tuple of more than there is")
                    stack[-count:] = [tuple(stack[-count:])]
                elif code == 0x52:  # REDUCE
                    arguments = stack.pop()
                    stack[-1] = self._call(stack[-1], arguments)
                elif code == 0x51:  # BINPERSID
                    stack[-1] = self._persistent_load(stack[-1])
                elif code == 0x2E:  # STOP
                    return stack.pop()
                else:
                    self.position = position
                    self._other(code)
                    position = self.position
        finally:
            # A part may have moved on further before it failed.
            self.position = max(position, self.position)

    def _other(self, code: int) -> None:
        stack = self._stack
        if code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _NUMBERS:
            size, read = _NUMBERS[code]
            stack.append(read(self._take(size)))
        elif code in _TEXTS:
            size, decode = _TEXTS[code]
            stack.append(decode(self._take(int.from_bytes(self._take(size), "little"))))
        elif code in _LINES:
            stack.append(_LINES[code](self._line()))
        elif code in _ACTIONS:
            _ACTIONS[code](self)
        else:
            raise RefusedPickleError(f"its pickle has the opcode {code:#04x}, which plain data does not need")

    def _take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self._data):
            self.position = len(self._data)
            raise IndexError("it ends within a value")
        taken, self.position = self._data[self.position : end], end
        return taken

    def _line(self) -> str:
        end = self._data.find(b"\n", self.position, self.position + _MAX_LINE)
        if end < 0:
            raise IndexError("a line does not end")
        return self._take(end + 1 - self.position)[:-1].decode("utf-8")

    def _popped(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _call(self, function: Any, arguments: Any) -> Any:
        if id(function) not in self._given or not isinstance(arguments, tuple):
            raise RefusedPickleError("its pickle calls what is no function")
        return function(*arguments)

    def _global(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("a global without a name")
        found = self._find_class(module, name)
        self._given.add(id(found))
        self._stack.append(found)

    def _set_items(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("items for what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _extend(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, list):
            raise TypeError("elements for what is no list")
        target.extend(items)

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _dictionary(self) -> None:
        items = self._popped()
        self._stack.append({})
        self._set_items(self._stack[-1], items)

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items(self._stack[-1], [key, value])

    def _append(self) -> None:
        value = self._stack.pop()
        self._extend(self._stack[-1], [value])

    def _new_object(self) -> None:
        arguments = self._stack.pop()
        self._stack[-1] = self._call(self._stack[-1], arguments)

    def _global_of_stack(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(module, name)


def _key(key: Any) -> Any:
    """Return a key that hashes in no time: a scalar, or a tuple of them."""
    if not isinstance(key, _SCALARS) and not (
        isinstance(key, tuple) and all(isinstance(each, _SCALARS) for each in key)
    ):
        raise RefusedPickleError(f"its pickle has a dictionary key of type {type(key).__name__}")
    return key


def _unpacker(code: str) -> Callable[[bytes], Any]:
    return lambda raw: struct.unpack(code, raw)[0]


def _integer(raw: bytes) -> int:
    if len(raw) > _MAX_INTEGER:
        raise RefusedPickleError(f"its pickle has a number of {len(raw):,} bytes")
    return int.from_bytes(raw, "little", signed=True)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8")


def _old_text(raw: bytes) -> str:
    return raw.decode("latin-1")


def _int_line(text: str) -> int | bool:
    if text in ("00", "01"):
        return text == "01"
    try:
        return int(text.removesuffix("L"))
    except ValueError as error:
        raise TypeError(f"{text[:40]!r} is no number") from error


def _float_line(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise TypeError(f"{text[:40]!r} is no number") from error


_NUMBERS: dict[int, tuple[int, Callable[[bytes], Any]]] = {
    ord("J"): (4, _unpacker("<i")),
    ord("M"): (2, _unpacker("<H")),
    ord("G"): (8, _unpacker(">d")),
}
_TEXTS: dict[int, tuple[int, Callable[[bytes], Any]]] = {
    0x8C: (1, _text), 0x8D: (8, _text),
    ord("C"): (1, bytes), ord("B"): (4, bytes), 0x8E: (8, bytes),
    ord("U"): (1, _old_text), ord("T"): (4, _old_text),
    0x8A: (1, _integer), 0x8B: (4, _integer),
}  # fmt: skip
_LINES: dict[int, Callable[[str], Any]] = {ord("I"): _int_line, ord("L"): _int_line, ord("F"): _float_line}
# The machine's own methods, by opcode: private, as nobody else may call them out of turn.
# ruff: noqa: SLF001
_ACTIONS: dict[int, Callable[[PlainUnpickler], Any]] = {
    0x80: lambda m: m._take(1),  # PROTO
    0x95: lambda m: m._take(8),  # FRAME
    ord(")"): lambda m: m._stack.append(()),
    ord("]"): lambda m: m._stack.append([]),
    ord("}"): lambda m: m._stack.append({}),
    0x8F: lambda m: m._stack.append([]),  # EMPTY_SET
    ord("0"): lambda m: m._stack.pop(),
    ord("1"): lambda m: m._popped(),
    ord("2"): lambda m: m._stack.append(m._stack[-1]),
    ord("a"): PlainUnpickler._append,
    ord("e"): lambda m: m._extend(m._stack[m._marks[-1] - 1], m._popped()),
    0x90: lambda m: m._extend(m._stack[m._marks[-1] - 1], m._popped()),  # ADDITEMS
    0x91: lambda m: m._stack.append(m._popped()),  # FROZENSET
    ord("l"): lambda m: m._stack.append(m._popped()),
    ord("d"): PlainUnpickler._dictionary,
    ord("s"): PlainUnpickler._set_item,
    ord("u"): lambda m: m._set_items(m._stack[m._marks[-1] - 1], m._popped()),
    ord("b"): lambda m: m._stack.pop(),  # BUILD
    ord("c"): lambda m: m._global(m._line(), m._line()),
    0x93: PlainUnpickler._global_of_stack,
    0x81: PlainUnpickler._new_object,
    0x94: PlainUnpickler._memoize,
    ord("p"): lambda m: m._memo.__setitem__(_int_line(m._line()), m._stack[-1]),
    ord("g"): lambda m: m._stack.append(m._memo[_int_line(m._line())]),
}
