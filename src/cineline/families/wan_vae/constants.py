"""Numbers that both the VAE's modules and what is computed of their costs go by (no torch)."""

TILE, TILE_STRIDE = 256, 192
"""Pixels a side of a tile, and from one tile to the next (diffusers' defaults)."""
