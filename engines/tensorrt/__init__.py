"""Graphs as TensorRT engines, with kernels of our own for the TTT layers."""
