"""Other machines: keys, messages, and the work between.

The run has a message server of its own (`server.py`) that lets in whom it has invited (`users.py`, `ticket.py`).
Workers ask and the run's desk answers (`bus.py`, `link.py`, `desk.py`, in the frames of `wire.py`); weights go in
chunks with sums (`blobs.py`, `versions.py`).
"""
