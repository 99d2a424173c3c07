"""Measurements of the kernels and the model: `python -m benchmarks.NAME`, each in a process of its own."""
import time

BEGAN = time.monotonic()  # before torch is imported, which a command's seconds hold, too
