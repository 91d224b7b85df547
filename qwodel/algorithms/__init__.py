"""Matrices in, matrices out: number formats, scales, rounding. No files, no models, no progress."""
