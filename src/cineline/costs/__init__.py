"""What a model costs, from its config files alone: weights, FLOP, bytes that travel, activations (no torch)."""
