"""A run folder → one page that needs nothing else, and pictures."""
