"""From the PyTorch reference to ONNX bundles."""
