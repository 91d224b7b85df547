"""How quantized weights are named and described for their readers."""
