"""Transformers that diffusers does not have, in its style."""
