"""Makes the mini models that ship with Cineline (see README.md here)."""
