"""Other machines: a message server of the run's own, keys, and the work that goes through it."""
