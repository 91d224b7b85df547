"""What must know a network's shape: running it block by block, what its layers see, and which feeds which."""
