"""The control socket of a run."""
