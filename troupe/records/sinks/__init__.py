"""Where metrics go: each sink keeps what it cares for, in a thread of its own."""
