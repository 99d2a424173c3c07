"""The kernels' compiled code, run without a GPU."""
