"""Which stored tensors make up which weight, and how its numbers are read."""
