"""The API, and the life of the ranks behind it."""
