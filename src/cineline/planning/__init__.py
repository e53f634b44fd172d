"""Which way to divide a model over devices: cuts, seconds and bytes, computed before anything runs (no torch)."""
