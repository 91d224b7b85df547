"""What quantization did to a model: errors of weights, outputs and predictions."""
