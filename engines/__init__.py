"""Backends: the implementations of `runtime.runner.Runner`. Imports no torch."""
