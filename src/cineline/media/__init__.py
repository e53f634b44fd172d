"""Frames and files."""
