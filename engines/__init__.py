"""Runs graphs: the implementations of `runtime.engine.Runner`. Never torch."""
