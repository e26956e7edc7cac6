"""The daemon's trainer: a process, and the wire to it."""
