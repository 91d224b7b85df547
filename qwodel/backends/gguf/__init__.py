"""The GGUF backend: llama.cpp's converter and quantizer, each in a process of its own."""
