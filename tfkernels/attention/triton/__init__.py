"""Attention in Triton: forward, backward and decode kernels, their launch tables and launchers."""
