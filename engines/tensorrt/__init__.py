"""Builds and runs TensorRT engines, with custom kernels for the TTT layers."""
