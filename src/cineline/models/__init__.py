"""Model families: how each is cut over the stages."""
