"""Wan's VAE of causal convolutions, which other families have with other weights."""
