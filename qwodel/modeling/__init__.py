"""What must know a network's shape: running a model block by block, and what its layers see."""
