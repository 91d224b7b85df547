"""Core ML packages for Apple devices, made by coremltools and checked without its runtime."""
