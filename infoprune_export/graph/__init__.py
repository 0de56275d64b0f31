"""From the PyTorch network to ONNX graphs: export, rewriting by a plan, FLOP counts, reference outputs."""
