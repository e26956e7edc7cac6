"""External engines: servers of other programs that complete prompts, in the free schedule."""
