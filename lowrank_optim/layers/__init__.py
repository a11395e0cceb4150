"""Layers and weights that are not stored as plain floats."""
