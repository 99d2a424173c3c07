"""Measures of pictures and of autoencoders."""
