"""Runs graphs: the implementations of `runtime.engine.Engine`. Never torch."""
