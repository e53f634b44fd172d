"""What Wan's components weigh and compute (no torch)."""
