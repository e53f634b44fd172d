"""A rank's process: its loop, and how it starts."""
