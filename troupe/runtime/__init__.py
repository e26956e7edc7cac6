"""Mailboxes, actors, processes, files; no GRPO."""
