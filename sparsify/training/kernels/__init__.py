"""Fused and compiled kernels of training steps."""
