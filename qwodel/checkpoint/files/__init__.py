"""Safetensors in and out: reading tensors and rows of them, writing them into their places, what lies beside."""
