"""The TTT-Video model in PyTorch: readable, slow, right. What every other implementation is held to."""
