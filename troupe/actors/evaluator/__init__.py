"""Evaluation while training goes on: sets of rows, answered with pinned versions."""
