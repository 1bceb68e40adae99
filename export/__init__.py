"""Exports the PyTorch reference to bundles of ONNX graphs and TensorRT engines."""
