"""The engine's schedule replayed on given costs (no torch)."""
