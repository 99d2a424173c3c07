"""Norm and rotary position embedding of queries and keys, the tables of angles, and positions on a grid."""
from tfkernels.rotary.op import qk_norm_rotary
from tfkernels.rotary.reference import RotatedQK, qk_norm_rotary_reference
from tfkernels.rotary.tables import grid_positions, rotary_table

__all__ = ["RotatedQK", "grid_positions", "qk_norm_rotary", "qk_norm_rotary_reference", "rotary_table"]
