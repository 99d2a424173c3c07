"""Adapters that hand tfkernels to other libraries through their own registries; nothing is patched."""
