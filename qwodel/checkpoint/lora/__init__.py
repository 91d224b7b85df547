"""LoRA files: their keys, the weights they are for, merging."""
