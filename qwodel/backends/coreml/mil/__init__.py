"""Written Core ML programs: read from the package, and evaluated on the CPU."""
