"""Wan 2.2, all of it."""
