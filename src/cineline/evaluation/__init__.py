"""Judging videos: whether one shows what its prompt says, and how much two differ."""
