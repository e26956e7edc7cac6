"""Backwards through the network, by hand."""
