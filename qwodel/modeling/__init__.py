"""What must know a network's shape: which layer feeds which."""
