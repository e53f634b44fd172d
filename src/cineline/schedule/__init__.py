"""What is done when, and by which rank (no torch)."""
