"""Norm of queries and keys with rotary embedding, and positions on an image's grid."""
from tfkernels.rotary.op import RotatedQK, grid_positions, qk_norm_rotary, qk_norm_rotary_reference, rotary_table

__all__ = ["RotatedQK", "grid_positions", "qk_norm_rotary", "qk_norm_rotary_reference", "rotary_table"]
