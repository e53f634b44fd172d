"""What every room speaks of: requests, configs, messages, what a family promises (no torch)."""
