"""The live page of a daemon."""
