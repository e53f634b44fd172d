"""Numbers and words of HunyuanVideo 1.5's prompts (diffusers' `HunyuanVideo15Pipeline`; no torch)."""

DROPPED = 108
"""Tokens of the conversation before the prompt, which the transformer does not see."""

TEXT_ROWS, GLYPH_ROWS, IMAGE_ROWS = 1000, 256, 729
"""Tokens that it sees of a prompt, of the words in it that are to be written, and of an image, padded."""

CONTEXT = TEXT_ROWS + GLYPH_ROWS + IMAGE_ROWS

SKIPPED = 2
"""Last layers of the text encoder that are not run."""
