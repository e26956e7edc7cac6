"""A run that goes on by itself and can be spoken to."""
