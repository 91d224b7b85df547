"""Carrying a plan out: read, compute, write, read back."""
