"""Safetensors in, safetensors out, tensor by tensor.

``build_plan`` decides what happens to every tensor before any work starts,
``convert`` carries the plan out, ``verify`` reads the result back as its
consumer would.
"""
