"""A run that goes on by itself, and how one speaks with a run from outside."""
