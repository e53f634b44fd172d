"""Qwen-Image: pictures from text, by two streams of tokens."""
