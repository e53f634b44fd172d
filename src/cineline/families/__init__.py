"""What a model family says of itself, and the families that there are."""
