"""Triton kernels of the patch operators."""
