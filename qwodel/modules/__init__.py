"""Torch modules that execute quantized arithmetic."""
