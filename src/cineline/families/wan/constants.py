"""Numbers that both Wan's modules and what is computed of their costs go by (no torch)."""

TEXT_TOKENS = 512
"""Rows of a prompt's embedding; shorter prompts are padded with zeros, longer ones cut off."""

TIME_ROWS = 16
"""Distinct rows of a time embedding that travel, of S. Two timesteps at most make rows that differ, and the last
elements of a tensor (of each thread's share) go through scalar code, whose SiLU has other bits."""
