"""The world that a policy talks to: tools, environments, and the episodes in them."""
