"""Edges between stages, axes within them, and how ranks meet."""
