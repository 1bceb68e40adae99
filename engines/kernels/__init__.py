"""The TTT scans as GPU kernels: written in Triton, compiled ahead of time, launched without Triton."""
