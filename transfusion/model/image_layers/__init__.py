"""Layers into and out of the decoder for patches: linear, DiT and U-Net."""
