"""Runs the reference's modules in PyTorch, with the weights of a bundle. The only engine that imports torch."""
