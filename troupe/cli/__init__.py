"""Flags to calls, results to lines."""
