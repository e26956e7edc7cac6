"""The network as pure functions over a dict of arrays."""
