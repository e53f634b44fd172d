"""Checkpoints' files."""
