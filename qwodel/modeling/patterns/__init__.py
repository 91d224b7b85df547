"""Seams of a network: linear layers whose outputs are cut or whose inputs are joined, and what feeds them."""

from qwodel.modeling.patterns.find import Example, find_patterns
from qwodel.modeling.patterns.findings import Finding, Patterns, SegPattern

__all__ = ["Example", "Finding", "Patterns", "SegPattern", "find_patterns"]
