"""Measures of pictures, captions and autoencoders, and the report of all results."""
