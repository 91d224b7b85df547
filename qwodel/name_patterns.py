"""Regular expressions on tensor names, in bounded time.

Expressions come from rules and adapter files, names from checkpoints, and ``re`` backtracks: ``(a+)+$``
on 40 characters takes hours. Where an expression could need more than a fixed number of steps on a name,
the same parse tree is run as an automaton, all alternatives at once (Thompson 1968), in time of length
times states. Its answers are those of ``re``; what an automaton cannot do (backreferences, atomic groups)
is refused only in expressions that need one.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any

from qwodel.exceptions import ConfigurationError

__all__ = ["NamePattern", "name_pattern"]

_MAX_PATTERN = 1000
_MAX_STEPS = 300_000  # of backtracking: a few milliseconds
_MAX_STATES = 5000
_USUAL = 256  # characters; few names are longer

_tree: Any = re._parser  # type: ignore[attr-defined] # noqa: SLF001 - the parse tree has no public name
_compiler: Any = re._compiler  # type: ignore[attr-defined] # noqa: SLF001
_c: Any = re._constants  # type: ignore[attr-defined] # noqa: SLF001
_CHARACTERS = (_c.LITERAL, _c.NOT_LITERAL, _c.ANY, _c.IN, _c.CATEGORY)
_REPEATS = (_c.MAX_REPEAT, _c.MIN_REPEAT)
_ASSERTS = (_c.ASSERT, _c.ASSERT_NOT)


@lru_cache(maxsize=4096)
def name_pattern(text: str, what: str = "the pattern") -> NamePattern:
    """Return the compiled pattern, from a cache.

    Raises:
        ConfigurationError: as :class:`NamePattern`.
    """
    return NamePattern(text, what)


class NamePattern:
    """A regular expression in Python's syntax.

    Args:
        text: the expression, of at most 1000 characters.
        what: where it is from, for messages.

    Raises:
        ConfigurationError: it is no regular expression, or one that could take too long.
    """

    def __init__(self, text: str, what: str = "the pattern") -> None:
        if len(text) > _MAX_PATTERN:
            raise ConfigurationError(
                f"{what} has a regular expression of {len(text):,} characters; at most {_MAX_PATTERN} are taken"
            )
        self.text, self._what = text, what
        self._steps: dict[int, float] = {}
        self._automaton: _Automaton | None = None
        try:
            self._plain = re.compile(text)
            self._parsed = _tree.parse(text)
            if self._too_slow(_USUAL):
                self._automaton = _Automaton(self._parsed)
        except _UnsupportedError as error:
            raise ConfigurationError(
                f"{what}: {text!r} could take too long on a name: {error}",
                hint="repeat one thing at a time; (a+)+ says no more than a+",
            ) from error
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigurationError(f"{what}: {text!r} is not a regular expression: {error}") from error

    def search(self, name: str) -> bool:
        """Whether the expression matches anywhere in ``name``."""
        if self._too_slow(len(name)):
            return self._slow().run(name, search=True, whole=False)
        return self._plain.search(name) is not None

    def fullmatch(self, name: str) -> bool:
        """Whether the expression matches the whole of ``name``."""
        if self._too_slow(len(name)):
            return self._slow().run(name, search=False, whole=True)
        return self._plain.fullmatch(name) is not None

    def _too_slow(self, length: int) -> bool:
        size = 1 << max(length - 1, 0).bit_length()
        if size not in self._steps:
            self._steps[size] = size * _choices(self._parsed, size)
        return self._steps[size] > _MAX_STEPS

    def _slow(self) -> _Automaton:
        if self._automaton is None:
            try:
                self._automaton = _Automaton(self._parsed)
            except _UnsupportedError as error:
                raise ConfigurationError(
                    f"{self._what}: {self.text!r} could take too long on a long name: {error}"
                ) from error
        return self._automaton


class _UnsupportedError(Exception):
    pass


def _choices(sequence: Any, length: int) -> float:
    """How many ways there are at most to try ``sequence`` from one place of a text of ``length``."""
    return math.prod(_choices_of(operation, argument, length) for operation, argument in sequence)


def _choices_of(operation: Any, argument: Any, length: int) -> float:
    if operation in _CHARACTERS or operation is _c.AT:
        return 1
    if operation is _c.BRANCH:
        return sum(_choices(branch, length) for branch in argument[1])
    if operation is _c.SUBPATTERN:
        return _choices(argument[3], length)
    if operation in (*_REPEATS, _c.POSSESSIVE_REPEAT):
        low, high, body = argument
        low, high = min(int(low), length), min(int(high), length)
        inner = _choices(body, length)
        try:
            return (high - low + 1) * float(inner) ** high
        except OverflowError:
            return math.inf
    if operation in _ASSERTS:
        return _choices(argument[1], length)
    if operation is _c.ATOMIC_GROUP:
        return _choices(argument, length)
    return 1 if operation is _c.GROUPREF else math.inf


class _Automaton:
    """States are numbers; ``_moves[s]`` is what a state does."""

    def __init__(self, parsed: Any) -> None:
        self._moves: list[tuple[Any, ...]] = [("accept",)]
        self._source = parsed.state
        self._start = self._sequence(parsed, 0, parsed.state.flags)

    def run(self, text: str, *, search: bool, whole: bool) -> bool:
        return self._run(self._start, text, 0, search=search, whole=whole)

    def _run(self, start: int, text: str, position: int, *, search: bool, whole: bool) -> bool:
        current = self._closure({start}, text, position)
        for place in range(position, len(text) + 1):
            if 0 in current and (not whole or place == len(text)):
                return True
            if place == len(text):
                break
            character = text[place]
            reached = {
                self._moves[state][2]
                for state in current
                if self._moves[state][0] == "take" and _accepts(self._moves[state][1], character)
            }
            if search:
                reached.add(start)
            elif not reached:
                break
            current = self._closure(reached, text, place + 1)
        return False

    def _closure(self, states: set[int], text: str, place: int) -> set[int]:
        """All states that are reached without taking a character."""
        seen, left = set(states), list(states)
        while left:
            kind, *rest = self._moves[left.pop()]
            if kind == "split":
                onward = rest[0]
            elif (kind == "at" and rest[0].match(text, place)) or (
                kind == "look" and self._run(rest[0], text, place, search=False, whole=False) is rest[1]
            ):
                onward = [rest[-1]]
            else:
                continue
            left += [state for state in onward if state not in seen]
            seen.update(onward)
        return seen

    def _add(self, *move: Any) -> int:
        if len(self._moves) >= _MAX_STATES:
            raise _UnsupportedError("it repeats too much")
        self._moves.append(move)
        return len(self._moves) - 1

    def _sequence(self, items: Any, follow: int, flags: int) -> int:
        """Add states for a sequence that ``follow`` comes after; return its first."""
        for operation, argument in reversed(list(items)):
            follow = self._item(operation, argument, follow, flags)
        return follow

    def _item(self, operation: Any, argument: Any, follow: int, flags: int) -> int:
        if operation in _CHARACTERS:
            return self._add("take", self._leaf(operation, argument, flags), follow)
        if operation is _c.AT:
            return self._add("at", self._leaf(operation, argument, flags), follow)
        if operation is _c.BRANCH:
            return self._add("split", [self._sequence(each, follow, flags) for each in argument[1]])
        if operation is _c.SUBPATTERN:
            _, added, removed, body = argument
            return self._sequence(body, follow, (flags | added) & ~removed)
        if operation in _REPEATS:
            low, high, body = argument
            return self._repeat(low, high, body, follow, flags)
        if operation in _ASSERTS:
            return self._look(operation, argument, follow, flags)
        raise _UnsupportedError("it has a backreference or an atomic group beside repeats")

    def _repeat(self, low: int, high: Any, body: Any, follow: int, flags: int) -> int:
        if high is _c.MAXREPEAT:
            state = self._add("split", [follow])
            self._moves[state][1].append(self._sequence(body, state, flags))
        else:
            state = follow
            for _ in range(int(high) - int(low)):
                state = self._add("split", [follow, self._sequence(body, state, flags)])
        for _ in range(int(low)):
            state = self._sequence(body, state, flags)
        return state

    def _look(self, operation: Any, argument: Any, follow: int, flags: int) -> int:
        direction, body = argument
        if direction < 0:
            # A fixed width, so backtracking is bounded by its branches.
            if _choices(body, _USUAL) > _USUAL:
                raise _UnsupportedError("it looks behind in too many ways")
            return self._add("at", self._leaf(operation, argument, flags), follow)
        return self._add("look", self._sequence(body, 0, flags), operation is _c.ASSERT, follow)

    def _leaf(self, operation: Any, argument: Any, flags: int) -> re.Pattern[str]:
        item = _tree.SubPattern(self._source, [(operation, argument)])
        compiled: re.Pattern[str] = _compiler.compile(item, flags)
        return compiled


@lru_cache(maxsize=65536)
def _accepts(leaf: re.Pattern[str], character: str) -> bool:
    return leaf.match(character) is not None
