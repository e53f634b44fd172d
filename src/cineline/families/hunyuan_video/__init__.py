"""HunyuanVideo 1.5: videos from text, by two streams of tokens."""
